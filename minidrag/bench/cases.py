"""Benchmark cases: drags of rendered scenes with a known true result, baselines and measures."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn

from minidrag.bench.metrics import detail, distances, image_features, image_fidelity, sharpness
from minidrag.bench.placement import Motion, place
from minidrag.bench.styles import styled
from minidrag.images import psnr, resize
from minidrag.model import Model
from minidrag.points import Pixel
from minidrag.tiny.renderer import SIDE, layer_map, layers
from minidrag.tiny.scenes import Drag, Scene, caption, drags, random_scene
from minidrag.window import Window

KINDS = {  # kind of case -> prefixes of the drags' names
    "object": ("move",),
    "carry": ("carry",),  # an object by several handles
    "light": ("move the sun", "move the moon"),
    "peak": ("raise", "lower", "shift"),
    "stretch": ("stretch", "shrink"),
    "gaze": ("turn",),
    "smile": ("widen", "narrow"),
    "keep": (),  # a second handle must stay where it is
}
DISC = 8  # pixels: radius of the patch that is pasted if the part does not move rigidly
ARRIVED = 0.3  # largest remaining fraction
Measures = dict[str, float | bool | list[float] | None]  # a list has one value per pair of points
Learned = Callable[["Case", Image.Image], Measures]  # MD and IF of a result


@dataclass(frozen=True, eq=False)
class Case:
    """One drag of one image."""

    name: str  # unique, usable as a path
    kind: str  # group in the tables
    before: Image.Image
    mask: np.ndarray  # (H, W), bool, True in the editable region
    prompt: str
    handles: Sequence[Pixel]
    targets: Sequence[Pixel]
    masked: bool = field(default=True, kw_only=True)  # whether the edit gets the mask, or only the measures

    @property
    def lengths(self) -> list[float]:
        """Distance from each handle to its target, in pixels."""
        return [math.dist(*pair) for pair in zip(self.handles, self.targets, strict=True)]

    @property
    def drags(self) -> str:
        """Description of the drags."""
        pairs = zip(self.handles, self.targets, strict=True)
        return " ".join(f"{x:g},{y:g}:{to_x:g},{to_y:g}" for (x, y), (to_x, to_y) in pairs)


@dataclass(frozen=True, eq=False)
class SceneCase(Case):
    """A case with a known true result, named after its kind and number."""

    scene: Scene
    drag: Drag
    truth: Image.Image
    style: str = "plain"
    tile: Window = Window(0, 0, SIDE, SIDE)  # where the scene is in the image

    @property
    def drags(self) -> str:
        return self.drag.name


@dataclass(frozen=True)
class Edited:
    """Result of an edit of a case."""

    image: Image.Image
    raw: Image.Image  # as decoded, before the background is pasted
    seconds: dict[str, float]  # per stage
    back: Image.Image | None = None  # the image after the same drag backwards
    # PSNR of the original, inverted and denoised without a drag, by what the autoencoder makes of it.
    reconstruction: float | None = None
    lora_loss: float | None = None  # as `harness.lora_loss`
    enlarged: Image.Image | None = None  # the edit without the original's detail


Editor = Callable[[Case], Edited]


def dragging_back(edit: Editor) -> Editor:
    """Return an editor that also drags each result back, from its targets to its handles.

    That should restore the original, which measures an edit whose true result is unknown. The mask gets a
    disc around each target, which may lie outside it.
    """

    def there_and_back(case: Case) -> Edited:
        edited = edit(case)
        mask = case.mask.copy()
        row, column = np.indices(mask.shape)
        for x, y in case.targets:
            mask |= np.hypot(column - x, row - y) <= DISC
        reverse = Case(case.name, case.kind, edited.image, mask, case.prompt, case.targets, case.handles)
        return replace(edited, back=edit(reverse).image)

    return there_and_back


def kind_of(drag: Drag) -> str:
    if ", keep" in drag.name:
        return "keep"
    matching = [kind for kind, prefixes in KINDS.items() if drag.name.startswith(prefixes)]
    return matching[-1]  # "move the sun" also matches "move"


def make_case(kind: str, number: int, seed: int, style: str = "plain") -> SceneCase:
    """Draw a case of a kind. Depends only on the arguments, not on other cases."""
    rng = random.Random(f"{seed} bench {kind} {number}")
    while True:
        scene = random_scene(rng)
        matching = [drag for drag in drags(scene, rng) if kind_of(drag) == kind]
        if matching:
            drag = matching[int(rng.random() * len(matching))]
            return scene_case(f"{kind}-{number:03d}", kind, scene, drag, style)


def scene_case(name: str, kind: str, scene: Scene, drag: Drag, style: str = "plain") -> SceneCase:
    mask = np.asarray(drag.mask) > 0
    handles, targets = ([Pixel(*point) for point in points] for points in (drag.handles, drag.targets))
    before, truth = (styled(style, it) for it in (scene, drag.after))
    return SceneCase(name, kind, before, mask, caption(scene), handles, targets, scene, drag, truth, style)


def make_cases(count: int, kinds: Sequence[str], seed: int, style: str = "plain") -> list[SceneCase]:
    """Draw `count` cases, cycling through the kinds."""
    return [make_case(kinds[i % len(kinds)], i // len(kinds), seed, style) for i in range(count)]


def pasted(case: SceneCase) -> Image.Image:
    """Cut-and-paste baseline: move the part to its target and inpaint the hole smoothly.

    Cuts a rigidly moving part along its outline, otherwise a disc around each handle.
    """
    motion = Motion.of(case.drag, case.scene)
    image = np.array(case.before)
    parts = [part for part, _ in layers(case.scene)]
    visible = layer_map(case.scene) == parts.index(motion.part)
    column = np.arange(SIDE)
    row = column[:, None]
    pieces = []
    for (x, y), target in motion.pairs[: 1 if motion.shape is None else None]:
        disc = np.hypot(column - x, row - y) <= DISC
        offset = round(target[0] - x), round(target[1] - y)
        pieces.append((visible if motion.shape is None else visible & disc, offset))
    hole = np.any([piece for piece, _ in pieces], axis=0)
    result = fill(image, hole)
    for piece, (right, down) in pieces:
        rows, columns = np.nonzero(piece)
        inside = (rows + down >= 0) & (rows + down < SIDE) & (columns + right >= 0) & (columns + right < SIDE)
        rows = rows[inside]
        columns = columns[inside]
        result[rows + down, columns + right] = image[rows, columns]
    return Image.fromarray(result)


def fill(image: np.ndarray, hole: np.ndarray, rounds: int = 300) -> np.ndarray:
    """Inpaint by repeatedly averaging the four neighbors. image: (H, W, 3). hole: (H, W), bool."""
    filled = image.astype(np.float64)
    filled[hole] = image[~hole].mean(axis=0)
    for _ in range(rounds):
        wide = np.pad(filled, ((1, 1), (1, 1), (0, 0)), mode="edge")
        means = (wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]) / 4
        filled[hole] = means[hole]
    return np.rint(filled).astype(np.uint8)


def baselines(case: Case) -> dict[str, Image.Image]:
    """Baseline images: no edit and, for scenes that are the whole image, cut and paste."""
    results = {"no edit": case.before}
    if isinstance(case, SceneCase) and case.before.size == (SIDE, SIDE):
        results["cut and paste"] = pasted(case)
    return results


def measure(case: Case, image: Image.Image, raw: Image.Image, learned: Learned) -> Measures:
    """Measure a result. raw: the same before its background was pasted.

    Without a true result, everything is measured on `raw`, as in the paper. With one, `raw` is used only
    outside the mask.
    """
    if not isinstance(case, SceneCase):
        return learned(case, raw)
    tile = resize(case.tile.crop(image), (SIDE, SIDE))
    placement = place(tile, case.scene, case.drag, partial(styled, case.style))
    measures: Measures = {
        "distance": None if placement.lost else placement.distance,
        "remaining": None if placement.lost else placement.remaining,
        "lost": placement.lost,
        "arrived": not placement.lost and placement.remaining <= ARRIVED,
        "PSNR inside": psnr(image, case.truth, case.mask),
        "PSNR outside": psnr(raw, case.truth, ~case.mask),
    }
    if image.size != (SIDE, SIDE):
        measures["sharpness"] = sharpness(image, case.truth, case.mask)
        measures["detail"] = detail(image, case.truth, case.mask, (SIDE, SIDE))
    return measures | learned(case, image)


def learned_measures(model: Model, network: nn.Module | None, own_size: bool = False) -> Learned:
    """Return a function that measures MD of each pair of points by a model's features, and IF by a network.

    network: None leaves out IF. own_size: the model sees images at their size, not its training resolution.
    """
    cache: dict[str, torch.Tensor] = {}  # features of the original of the current case

    def measures(case: Case, image: Image.Image) -> Measures:
        if image is case.before:  # exact without running the networks
            return {"MD": case.lengths, "IF": None if network is None else 1.0}
        size = min(image.size) if own_size else None
        if case.name not in cache:
            cache.clear()
            cache[case.name] = image_features(model, case.before, case.prompt, size=size)
        after = image_features(model, image, case.prompt, size=size)
        md = distances(cache[case.name], after, case.handles, case.targets, image.size)
        fidelity = None if network is None else image_fidelity(network, case.before, image)
        return {"MD": md, "IF": fidelity}

    return measures
