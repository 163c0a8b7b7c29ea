"""Cases for measuring edits: drags of rendered scenes, whose true result is known, and other ways to one."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from minidrag.bench.metrics import distances, image_fidelity, picture_features, psnr, ssim
from minidrag.bench.placement import Moving, place
from minidrag.config import EditConfig
from minidrag.edit import decode, encode
from minidrag.images import Point, resize
from minidrag.tiny.picture import SIDE, layers, owners
from minidrag.tiny.scenes import Drag, Scene, caption, drags, random_scene, render
from minidrag.weights.model import Model

KINDS = {  # kind of case -> the first words of the drags' names; "keep" has a second handle that stays
    "object": ("move",),
    "carry": ("carry",),  # the same by several handles
    "light": ("move the sun", "move the moon"),
    "peak": ("raise", "lower", "shift"),
    "stretch": ("stretch", "shrink"),
    "gaze": ("turn",),
    "smile": ("widen", "narrow"),
    "keep": (),
}
DISC = 8  # pixels: what is cut out around a handle where a thing does not move as a whole
ARRIVED = 0.3  # of the way left, or less
Measures = dict[str, float | bool | list[float] | None]  # a list: one value for each pair of points
Learned = Callable[["Case", Image.Image], Measures]


@dataclass(frozen=True, eq=False)
class Case:
    """One drag of one picture.

    name: its own among all cases, and a path. kind: what tables put together. mask: where the picture may
    change, (H, W), bool. handles, targets: (x, y) in pixels.
    """

    name: str
    kind: str
    before: Image.Image
    mask: np.ndarray
    prompt: str
    handles: Sequence[Point]
    targets: Sequence[Point]

    @property
    def lengths(self) -> list[float]:
        """From each handle to its target, in pixels."""
        return [math.dist(*pair) for pair in zip(self.handles, self.targets, strict=True)]

    @property
    def drags(self) -> str:
        """What is dragged, in words or numbers."""
        pairs = zip(self.handles, self.targets, strict=True)
        return " ".join(f"{x:g},{y:g}:{to_x:g},{to_y:g}" for (x, y), (to_x, to_y) in pairs)


@dataclass(frozen=True, eq=False)
class SceneCase(Case):
    """A case whose true result is known. The name is its kind and its number among them."""

    scene: Scene
    drag: Drag
    truth: Image.Image

    @property
    def drags(self) -> str:
        return self.drag.name


@dataclass(frozen=True)
class Edited:
    """What an edit makes of a case: the picture, the same as it left the decoder, and seconds per stage."""

    picture: Image.Image
    raw: Image.Image
    seconds: dict[str, float]


Editor = Callable[[Case], Edited]


def kind_of(drag: Drag) -> str:
    if ", keep" in drag.name:
        return "keep"
    fitting = [kind for kind, starts in KINDS.items() if drag.name.startswith(starts)]
    return fitting[-1]  # "move the sun" is a "move" too


def make_case(kind: str, number: int, seed: int) -> SceneCase:
    """The case of a kind by its number, whatever other cases there are."""
    rng = random.Random(f"{seed} bench {kind} {number}")
    while True:
        scene = random_scene(rng)
        fitting = [drag for drag in drags(scene, rng) if kind_of(drag) == kind]
        if fitting:
            return scene_case(f"{kind}-{number:03d}", kind, scene, fitting[int(rng.random() * len(fitting))])


def scene_case(name: str, kind: str, scene: Scene, drag: Drag) -> SceneCase:
    mask, ends = np.asarray(drag.mask) > 0, (drag.handles, drag.targets)
    return SceneCase(name, kind, render(scene), mask, caption(scene), *ends, scene, drag, render(drag.after))


def make_cases(count: int, kinds: Sequence[str], seed: int) -> list[SceneCase]:
    """So many cases, the kinds by turns."""
    return [make_case(kinds[i % len(kinds)], i // len(kinds), seed) for i in range(count)]


def pasted(case: SceneCase) -> Image.Image:
    """What a pair of scissors does: the thing cut out and laid down at the target, the hole filled smoothly.

    A thing that moves as a whole is cut along its outline, of others a disc around each handle.
    """
    moving, picture = Moving.by(case.drag, case.scene), np.array(case.before)
    drawn = [part for part, _ in layers(case.scene)]
    own = owners(case.scene) == drawn.index(moving.part)
    column, row = np.arange(SIDE), np.arange(SIDE)[:, None]
    pieces = []
    for (x, y), target in moving.pairs[: 1 if moving.shape is None else None]:
        near = np.hypot(column - x, row - y) <= DISC
        step = round(target[0] - x), round(target[1] - y)
        pieces.append((own if moving.shape is None else own & near, step))
    hole = np.any([piece for piece, _ in pieces], axis=0)
    result = fill(picture, hole)
    for piece, (right, down) in pieces:
        rows, columns = np.nonzero(piece)
        inside = (rows + down >= 0) & (rows + down < SIDE) & (columns + right >= 0) & (columns + right < SIDE)
        rows, columns = rows[inside], columns[inside]
        result[rows + down, columns + right] = picture[rows, columns]
    return Image.fromarray(result)


def fill(picture: np.ndarray, hole: np.ndarray, rounds: int = 300) -> np.ndarray:
    """Gives a hole's pixels the mean of their neighbours, over and over. picture: (H, W, 3). hole: (H, W)."""
    filled = picture.astype(np.float64)
    filled[hole] = picture[~hole].mean(axis=0)
    for _ in range(rounds):
        wide = np.pad(filled, ((1, 1), (1, 1), (0, 0)), mode="edge")
        means = (wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]) / 4
        filled[hole] = means[hole]
    return np.rint(filled).astype(np.uint8)


def references(case: Case, model: Model | None) -> dict[str, Image.Image]:
    """Other ways to a result: nothing done; for a scene scissors too and, with a model, what its autoencoder
    leaves of both ends: the picture as it was, and the truth, which no edit by this model can get nearer to.
    """
    found = {"no edit": case.before}
    if isinstance(case, SceneCase):
        found["cut and paste"] = pasted(case)
        if model is not None:
            for name, picture in (("VAE of the original", case.before), ("VAE of the truth", case.truth)):
                back = decode(model, encode(model, picture, EditConfig())[0])
                found[name] = resize(back, picture.size)
    return found


def measure(case: Case, picture: Image.Image, raw: Image.Image, learned: Learned) -> Measures:
    """All measures of one result, which may be pasted into the original, and of `raw`, which is not.

    Without the truth all are of `raw`, as the method's authors measure; with it, those outside the mask.
    """
    if not isinstance(case, SceneCase):
        return learned(case, raw)
    placed = place(picture, case.scene, case.drag)
    found: Measures = {
        "distance": None if placed.lost else placed.distance,
        "share": None if placed.lost else placed.share,
        "lost": placed.lost,
        "arrived": not placed.lost and placed.share <= ARRIVED,
        "PSNR inside": psnr(picture, case.truth, case.mask),
        "SSIM inside": ssim(picture, case.truth, case.mask),
        "PSNR outside": psnr(raw, case.truth, ~case.mask),
        "SSIM outside": ssim(raw, case.truth, ~case.mask),
    }
    return found | learned(case, picture)


def learned_measures(model: Model, network: nn.Module | None, own_size: bool = False) -> Learned:
    """MD by the features of a model, the distance of each pair, and, with a network, IF.

    own_size: show the model the pictures at their own size, not at the one that it was trained on.
    """
    last: dict[str, torch.Tensor] = {}  # the original's features, with which all results of a case compare

    def measures(case: Case, picture: Image.Image) -> Measures:
        if picture is case.before:  # known without asking: nothing has moved, and nothing is lost
            return {"MD": case.lengths, "IF": None if network is None else 1.0}
        size = min(picture.size) if own_size else None
        if case.name not in last:
            last.clear()
            last[case.name] = picture_features(model, case.before, case.prompt, size=size)
        after = picture_features(model, picture, case.prompt, size=size)
        found = distances(last[case.name], after, case.handles, case.targets, picture.size)
        fidelity = None if network is None else image_fidelity(network, case.before, picture)
        return {"MD": found, "IF": fidelity}

    return measures
