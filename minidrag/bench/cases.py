"""Cases for measuring edits: drags of rendered scenes, whose true result is known, and other ways to one."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import nn

from minidrag.bench.metrics import image_fidelity, mean_distance, picture_features, psnr, ssim
from minidrag.edit import EditConfig, decode, encode
from minidrag.images import resize
from minidrag.tiny.fit import Moving, place
from minidrag.tiny.picture import SIDE, layers, owners
from minidrag.tiny.scenes import Drag, Scene, caption, drags, random_scene, render
from minidrag.weights import Model

KINDS = {  # kind of case -> the first words of the drags' names; "keep" has a second handle that stays
    "object": ("move",),
    "light": ("move the sun", "move the moon"),
    "peak": ("raise", "lower", "shift"),
    "stretch": ("stretch", "shrink"),
    "gaze": ("turn",),
    "smile": ("widen", "narrow"),
    "keep": (),
}
DISC = 8  # pixels: what is cut out around a handle where a thing does not move as a whole
Measures = dict[str, float | bool | None]
Learned = Callable[["Case", Image.Image], Measures]


@dataclass(frozen=True)
class Case:
    """One drag of one scene. name: its kind and its number among them."""

    name: str
    kind: str
    scene: Scene
    drag: Drag

    @cached_property
    def before(self) -> Image.Image:
        return render(self.scene)

    @cached_property
    def truth(self) -> Image.Image:
        return render(self.drag.after)

    @cached_property
    def mask(self) -> np.ndarray:
        """Where the picture may change: (128, 128), bool."""
        return np.asarray(self.drag.mask) > 0

    @property
    def prompt(self) -> str:
        return caption(self.scene)


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


def make_case(kind: str, number: int, seed: int) -> Case:
    """The case of a kind by its number, whatever other cases there are."""
    rng = random.Random(f"{seed} bench {kind} {number}")
    while True:
        scene = random_scene(rng)
        fitting = [drag for drag in drags(scene, rng) if kind_of(drag) == kind]
        if fitting:
            return Case(f"{kind}-{number:03d}", kind, scene, fitting[int(rng.random() * len(fitting))])


def make_cases(count: int, kinds: Sequence[str], seed: int) -> list[Case]:
    """So many cases, the kinds by turns."""
    return [make_case(kinds[i % len(kinds)], i // len(kinds), seed) for i in range(count)]


def pasted(case: Case) -> Image.Image:
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
    """Other ways to a result: nothing done, scissors, and, with a model, what its autoencoder leaves of both
    ends: the picture as it was, and the truth, which no edit by this model can get nearer to.
    """
    found = {"no edit": case.before, "cut and paste": pasted(case)}
    if model is not None:
        for name, picture in (("VAE of the original", case.before), ("VAE of the truth", case.truth)):
            back = decode(model, encode(model, picture, EditConfig())[0])
            found[name] = resize(back, picture.size)
    return found


def measure(case: Case, picture: Image.Image, raw: Image.Image, learned: Learned) -> Measures:
    """All measures of one result. Outside the mask that of `raw` counts: `picture` may be pasted there."""
    placed = place(picture, case.scene, case.drag)
    found: Measures = {
        "distance": None if placed.lost else placed.distance,
        "share": None if placed.lost else placed.share,
        "lost": placed.lost,
        "PSNR inside": psnr(picture, case.truth, case.mask),
        "SSIM inside": ssim(picture, case.truth, case.mask),
        "PSNR outside": psnr(raw, case.truth, ~case.mask),
        "SSIM outside": ssim(raw, case.truth, ~case.mask),
    }
    return found | learned(case, picture)


def learned_measures(model: Model, network: nn.Module | None) -> Learned:
    """MD by the features of a model and, with a network, IF."""
    features: dict[
        str, torch.Tensor
    ] = {}  # of the last case's original: all its results are compared with it

    def measures(case: Case, picture: Image.Image) -> Measures:
        if case.name not in features:
            features.clear()
            features[case.name] = picture_features(model, case.before, case.prompt)
        drag, before = case.drag, features[case.name]
        distance = mean_distance(
            model, before, picture, drag.handles, drag.targets, case.prompt, case.before.size
        )
        fidelity = None if network is None else image_fidelity(network, case.before, picture)
        return {"MD": distance, "IF": fidelity}

    return measures
