"""Where a dragged thing is in an edited picture, by analysis through synthesis.

The numbers of the scene that the drag changes are varied until its rendering is nearest to the picture.
Rendering is exact to a fraction of a pixel, so the answer is too, as far as the edit is sharp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from PIL import Image, ImageFilter

from minidrag.tiny.picture import SIDE, Part, Scene, render
from minidrag.tiny.scenes import Drag, Point
from minidrag.tiny.things import Array

Numbers = tuple[float, ...]  # pixels: (right, down), or (along the drag, right, down) where a shape changes
Cost = Callable[[Numbers], float]

BLUR = 1.0  # pixels, of both pictures: a decoder's edges are not as hard as rendered ones
CAP = 64.0  # of 255; colours further apart count as no further, so that some wrong pixels decide nothing
GROWN = 8  # pixels around the mask that count as well, for what went too far
BEYOND = 26.0  # pixels that a thing is looked for on all sides of its way
GRID = 4  # pixels between the first guesses, and the side of what is one pixel then
FINEST = 0.1  # pixels
ABSENT = {"gaze": 100.0, "smile": -0.6}  # at which the pupils are off the face, and the mouth is a dot
LEAST = {"stretch": 0.1, "gaze": -3.0, "smile": -0.6}
CONTRAST = 12.0  # of 255; a thing is seen where it differs by more from what is behind it
# Beyond these a thing is lost. Decoded, blurred, or half transparent, a thing keeps a correlation of 0.8 and
# more and a misfit below 0.6; the best fit to noise of any grain reaches a correlation of 0.6.
MISFIT, LIKENESS, SHOWN = 0.6, 0.7, 0.25


@dataclass(frozen=True)
class Placement:
    """Where the dragged thing was found.

    points: where its handles are, (x, y) in pixels, those that were to stay left out. distance: from them to
    their targets, the mean, in pixels. share: of the way that is left, 0 at the target, 1 where it came from.
    misfit: how far the picture is from what was fitted to it, over the thing's contrast to what is behind it.
    lost: nothing fits, so the other numbers say nothing.
    """

    points: tuple[Point, ...]
    distance: float
    share: float
    misfit: float
    lost: bool


@dataclass(frozen=True)
class Moving:
    """What a drag moves: a part of the scene as a whole (shape is None), or a shape of an object.

    pairs: the handles that move, with their targets. slope: of the shape's number, per pixel of the drag.
    """

    scene: Scene
    part: Part
    shape: str | None
    slope: float
    pairs: tuple[tuple[Point, Point], ...]

    @classmethod
    def by(cls, drag: Drag, scene: Scene) -> Moving:
        after = drag.after
        pairs = tuple(pair for pair in zip(drag.handles, drag.targets, strict=True) if pair[0] != pair[1])
        if scene.objects == after.objects:
            peaks = [i for i, peak in enumerate(scene.peaks) if peak != after.peaks[i]]
            return cls(scene, ("peak", peaks[0]) if peaks else ("light", 0), None, 0.0, pairs)
        index = next(i for i, thing in enumerate(scene.objects) if thing != after.objects[i])
        changes = {
            name: getattr(after.objects[index], name) - getattr(scene.objects[index], name) for name in LEAST
        }
        shape = next((name for name in changes if changes[name]), None)
        slope = changes[shape] / math.dist(*pairs[0]) if shape else 0.0
        return cls(scene, ("object", index), shape, slope, pairs)

    def at(self, numbers: Numbers) -> Scene:
        """The scene with the thing elsewhere; a peak's foot stays on the horizon."""
        (kind, index), scene = self.part, self.scene
        right, down = (number / SIDE for number in numbers[-2:])
        if kind == "light":
            return replace(scene, light_x=scene.light_x + right, light_y=scene.light_y + down)
        if kind == "peak":
            x, height = scene.peaks[index]
            return with_peak(scene, index, x + right, max(height - down, 0.0))
        thing = scene.objects[index]
        thing = replace(thing, x=thing.x + right, y=thing.y + down)
        if self.shape:
            value = getattr(thing, self.shape) + self.slope * numbers[0]
            thing = replace(thing, **{self.shape: max(value, LEAST[self.shape])})
        return replace(scene, objects=(*scene.objects[:index], thing, *scene.objects[index + 1 :]))

    def absent(self) -> Scene:
        """The scene without the thing, or without what moves of it."""
        (kind, index), scene = self.part, self.scene
        if kind == "light":
            return replace(scene, light_y=-1.0)
        if kind == "peak":
            return with_peak(scene, index, scene.peaks[index][0], -0.08)
        rest = (scene.objects[:index], scene.objects[index + 1 :])
        if self.shape not in ABSENT:
            return replace(scene, objects=rest[0] + rest[1])
        thing = replace(scene.objects[index], **{self.shape: ABSENT[self.shape]})
        return replace(scene, objects=(*rest[0], thing, *rest[1]))

    def points(self, numbers: Numbers) -> tuple[Point, ...]:
        """Where the handles that move are."""
        right, down = numbers[-2:]
        points = []
        for handle, target in self.pairs:
            share = numbers[0] / math.dist(handle, target) if self.shape else 0.0
            x, y = (start + share * (end - start) for start, end in zip(handle, target, strict=True))
            points.append((x + right, y + down))
        return tuple(points)

    def guesses(self) -> list[Numbers]:
        """Where to look first: along the drag for a shape, on a grid around the way for the rest."""
        handle, target = self.pairs[0]
        ways = (
            [math.dist(handle, target)]
            if self.shape
            else [b - a for a, b in zip(handle, target, strict=True)]
        )
        step = GRID / 2 if self.shape else GRID
        axes = [np.arange(min(way, 0) - BEYOND, max(way, 0) + BEYOND, step).tolist() for way in ways]
        return [(*at, 0.0, 0.0) if self.shape else at for at in product(*axes)]


def with_peak(scene: Scene, index: int, x: float, height: float) -> Scene:
    return replace(scene, peaks=(*scene.peaks[:index], (x, height), *scene.peaks[index + 1 :]))


def place(result: Image.Image, scene: Scene, drag: Drag) -> Placement:
    """Finds what the drag was to move in an edited picture, wherever it went.

    result: RGB, 128 x 128. Only the drag's mask and a little around it are looked at.
    """
    moving = Moving.by(drag, scene)
    numbers = fit(result, moving, area(drag))
    misfit, likeness, shown = judge(result, moving, numbers, drag)
    points = moving.points(numbers)
    distances = [math.dist(point, target) for point, (_, target) in zip(points, moving.pairs, strict=True)]
    ways = [math.dist(*pair) for pair in moving.pairs]
    lost = misfit > MISFIT or likeness < LIKENESS or shown < SHOWN
    return Placement(points, sum(distances) / len(distances), sum(distances) / sum(ways), misfit, lost)


def area(drag: Drag) -> Array:
    """The pixels that are looked at: (128, 128), bool."""
    return np.asarray(drag.mask.filter(ImageFilter.MaxFilter(2 * GROWN + 1))) > 0


def soft(picture: Image.Image) -> Array:
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(BLUR)), dtype=np.float32)


def coarse(picture: Image.Image) -> Array:
    side = picture.width // GRID
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX), dtype=np.float32)


def apart(one: Array, other: Array) -> Array:
    """How different two pictures are at each pixel, at most CAP: (..., 3) -> (...)."""
    return np.minimum(np.abs(one - other).mean(axis=-1), np.float32(CAP))


def fit(result: Image.Image, moving: Moving, counts: Array) -> Numbers:
    """The numbers whose rendering is nearest to the result where it counts."""
    picture, small = soft(result)[counts], coarse(result)
    side = len(small)
    small_counts = counts.reshape(side, GRID, side, GRID).mean(axis=(1, 3))  # (H, W) -> (H / 4, W / 4)

    def cost(at: Numbers) -> float:
        return float(apart(soft(render(moving.at(at)))[counts], picture).mean())

    def coarse_cost(at: Numbers) -> float:
        drawn = np.asarray(render(moving.at(at), side), dtype=np.float32)
        return float((apart(drawn, small) * small_counts).sum())

    starts = best_apart(moving.guesses(), cost if moving.shape else coarse_cost)
    coupled = [(0, 2)] if moving.shape == "stretch" else []
    found = min((descend(cost, start, GRID, 1.0, coupled) for start in starts), key=lambda pair: pair[1])
    return descend(cost, found[0], 0.5, FINEST, coupled)[0]


def best_apart(guesses: list[Numbers], cost: Cost, count: int = 3) -> list[Numbers]:
    """The best guesses, each some way from the better ones."""
    chosen: list[Numbers] = []
    for guess in sorted(guesses, key=cost):
        if all(math.dist(guess, other) > 2 * GRID for other in chosen):
            chosen.append(guess)
    return chosen[:count]


def descend(
    cost: Cost, start: Numbers, step: float, finest: float, coupled: Sequence[tuple[int, int]] = ()
) -> tuple[Numbers, float]:
    """Walks as long as that lowers the cost, along the axes, in steps that are halved where it does not.

    coupled: pairs of axes that are also walked along together, for what a foot and a height do to a top.
    Returns where it ended, and the cost there.
    """
    axes = np.eye(len(start))
    ways = [*axes, *(axes[i] + way * axes[j] for i, j in coupled for way in (1, -1))]
    ways += [-way for way in ways]
    here, least = start, cost(start)
    while step >= finest:
        tried = [tuple((np.array(here) + step * way).tolist()) for way in ways]
        best, found = min(((at, cost(at)) for at in tried), key=lambda pair: pair[1])
        if found < least:
            here, least = best, found
        else:
            step /= 2
    return here, least


def judge(result: Image.Image, moving: Moving, numbers: Numbers, drag: Drag) -> tuple[float, float, float]:
    """How well the result is what was fitted to it, where the thing is seen.

    Returns the mean difference over the thing's contrast to what is behind it; the correlation of both
    pictures there and some pixels around; and the area where the thing is seen, over that in the truth.
    """
    behind, truth = soft(render(moving.absent())), soft(render(drag.after))
    here, found, looked_at = soft(render(moving.at(numbers))), soft(result), area(drag)
    contrast = np.abs(here - behind).mean(axis=-1)
    seen = (contrast > CONTRAST) & looked_at
    wanted = (np.abs(truth - behind).mean(axis=-1) > CONTRAST) & looked_at
    if not seen.any():
        return 1.0, 0.0, 0.0
    misfit = np.abs(found - here).mean(axis=-1)[seen].mean() / contrast[seen].mean()
    around = (np.asarray(Image.fromarray(seen).convert("L").filter(ImageFilter.MaxFilter(7))) > 0) & looked_at
    return float(misfit), correlation(here[around], found[around]), float(seen.sum() / wanted.sum())


def correlation(one: Array, other: Array) -> float:
    """Of the colours of some pixels, each channel about its mean: (N, 3) twice."""
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    return float((one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum() + 1e-9))
