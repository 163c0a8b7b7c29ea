"""Locate the dragged part in an edited image by analysis by synthesis.

Fits the scene parameters that the drag changes to the image. Rendering is accurate to a fraction of a pixel,
and so is the fit if the edit is sharp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from PIL import Image, ImageFilter

from minidrag.tiny.objects import Array
from minidrag.tiny.renderer import SIDE, Part, Scene, render
from minidrag.tiny.scenes import Drag, Point

Params = tuple[float, ...]  # pixels: (right, down), or (along the drag, right, down) for a shape parameter
Cost = Callable[[Params], float]
Draw = Callable[[Scene, int], Image.Image]  # a scene as an image of a side in pixels

BLUR = 1.0  # pixels, applied to both images: decoded edges are softer than rendered ones
CAP = 64.0  # of 255: largest color difference of a pixel, so that outliers do not decide the fit
MASK_MARGIN = 8  # pixels around the mask that are compared too, in case the edit overshoots
SEARCH_MARGIN = 26.0  # pixels around the drag that are searched
GRID = 4  # pixels: spacing of the initial guesses and downsampling factor of the coarse cost
FINEST = 0.1  # pixels: last step size
ABSENT = {"gaze": 100.0, "smile": -0.6}  # move the pupils off the face, shrink the mouth to a dot
MINIMUM = {"stretch": 0.1, "gaze": -3.0, "smile": -0.6}
CONTRAST = 12.0  # of 255: a part is visible where it differs from the background by more
# Otherwise the part is lost. Decoded, blurred or semitransparent parts have a correlation of at least 0.8
# and a misfit below 0.6. The best fit to noise of any grain size has a correlation of up to 0.6.
MAX_MISFIT = 0.6
MIN_CORRELATION = 0.7
MIN_VISIBLE = 0.25


@dataclass(frozen=True)
class Placement:
    """Measured position of the dragged part. If it is lost, the other values are meaningless."""

    distance: float  # mean distance to the targets in pixels
    remaining: float  # fraction of the drag that is left: 0 at the target, 1 at the start
    lost: bool


@dataclass(frozen=True)
class Motion:
    """Degrees of freedom of a drag: the position of a part and, if that changes, one shape parameter."""

    scene: Scene
    part: Part
    shape: str | None  # "stretch", "gaze", "smile" or None
    slope: float  # change of the shape parameter per pixel of the drag
    pairs: tuple[tuple[Point, Point], ...]  # moving handles and their targets

    @classmethod
    def of(cls, drag: Drag, scene: Scene) -> Motion:
        after = drag.after
        pairs = tuple(pair for pair in zip(drag.handles, drag.targets, strict=True) if pair[0] != pair[1])
        if scene.objects == after.objects:
            peaks = [i for i, peak in enumerate(scene.peaks) if peak != after.peaks[i]]
            return cls(scene, ("peak", peaks[0]) if peaks else ("light", 0), None, 0.0, pairs)
        index = next(i for i, thing in enumerate(scene.objects) if thing != after.objects[i])
        changes = {
            name: getattr(after.objects[index], name) - getattr(scene.objects[index], name)
            for name in MINIMUM
        }
        shape = next((name for name in changes if changes[name]), None)
        slope = changes[shape] / math.dist(*pairs[0]) if shape else 0.0
        return cls(scene, ("object", index), shape, slope, pairs)

    def apply(self, params: Params) -> Scene:
        """Scene with the part moved. The foot of a peak stays on the horizon."""
        kind, index = self.part
        scene = self.scene
        right, down = (param / SIDE for param in params[-2:])
        if kind == "light":
            return replace(scene, light_x=scene.light_x + right, light_y=scene.light_y + down)
        if kind == "peak":
            x, height = scene.peaks[index]
            return scene.with_peak(index, x + right, max(height - down, 0.0))
        thing = scene.objects[index]
        thing = replace(thing, x=thing.x + right, y=thing.y + down)
        if self.shape:
            value = getattr(thing, self.shape) + self.slope * params[0]
            thing = replace(thing, **{self.shape: max(value, MINIMUM[self.shape])})
        return scene.with_object(index, thing)

    def removed(self) -> Scene:
        """Scene without the moving part."""
        kind, index = self.part
        scene = self.scene
        if kind == "light":
            return replace(scene, light_y=-1.0)
        if kind == "peak":
            return scene.with_peak(index, scene.peaks[index][0], -0.08)
        if self.shape not in ABSENT:
            return replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])
        return scene.with_object(index, replace(scene.objects[index], **{self.shape: ABSENT[self.shape]}))

    def points(self, params: Params) -> tuple[Point, ...]:
        """Positions of the moving handles."""
        right, down = params[-2:]
        points = []
        for handle, target in self.pairs:
            fraction = params[0] / math.dist(handle, target) if self.shape else 0.0
            x, y = (start + fraction * (end - start) for start, end in zip(handle, target, strict=True))
            points.append((x + right, y + down))
        return tuple(points)

    def guesses(self) -> list[Params]:
        """Initial guesses: along the drag for a shape parameter, otherwise on a grid around it."""
        handle, target = self.pairs[0]
        if self.shape:
            extents = [math.dist(handle, target)]
            step = GRID / 2
        else:
            extents = [end - start for start, end in zip(handle, target, strict=True)]
            step = GRID
        axes = [
            np.arange(min(extent, 0) - SEARCH_MARGIN, max(extent, 0) + SEARCH_MARGIN, step).tolist()
            for extent in extents
        ]
        return [(*params, 0.0, 0.0) if self.shape else params for params in product(*axes)]


def place(result: Image.Image, scene: Scene, drag: Drag, draw: Draw = render) -> Placement:
    """Find the dragged part in an edited image.

    result: RGB, 128x128. Only the mask and a margin around it are compared. draw: in the style of the image.
    """
    motion = Motion.of(drag, scene)
    region = compared_region(drag)
    params = fit(result, motion, region, draw)
    misfit, correlation, visible = fit_quality(result, motion, params, drag, region, draw)
    points = zip(motion.points(params), motion.pairs, strict=True)
    distances = [math.dist(point, target) for point, (_, target) in points]
    lengths = [math.dist(*pair) for pair in motion.pairs]
    lost = misfit > MAX_MISFIT or correlation < MIN_CORRELATION or visible < MIN_VISIBLE
    return Placement(sum(distances) / len(distances), sum(distances) / sum(lengths), lost)


def compared_region(drag: Drag) -> Array:
    """Mask of the drag with a margin: (128, 128), bool."""
    return np.asarray(drag.mask.filter(ImageFilter.MaxFilter(2 * MASK_MARGIN + 1))) > 0


def blur(image: Image.Image) -> Array:
    return np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR)), dtype=np.float32)


def capped_difference(one: Array, other: Array) -> Array:
    """Mean absolute color difference of each pixel, at most CAP: (..., 3) -> (...)."""
    return np.minimum(np.abs(one - other).mean(axis=-1), np.float32(CAP))


def fit(result: Image.Image, motion: Motion, region: Array, draw: Draw = render) -> Params:
    """Fit the parameters to the result within a region, (128, 128), bool."""
    image = blur(result)[region]
    side = result.width // GRID
    small = np.asarray(result.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    weights = region.reshape(side, GRID, side, GRID).mean(axis=(1, 3))  # (H, W) -> (H / 4, W / 4)

    def cost(params: Params) -> float:
        return float(capped_difference(blur(draw(motion.apply(params), SIDE))[region], image).mean())

    def coarse_cost(params: Params) -> float:
        rendered = np.asarray(draw(motion.apply(params), side), dtype=np.float32)
        return float((capped_difference(rendered, small) * weights).sum())

    starts = best_distinct(motion.guesses(), cost if motion.shape else coarse_cost)
    coupled = [(0, 2)] if motion.shape == "stretch" else []
    best = min((descend(cost, start, GRID, 1.0, coupled) for start in starts), key=lambda pair: pair[1])
    return descend(cost, best[0], 0.5, FINEST, coupled)[0]


def best_distinct(guesses: list[Params], cost: Cost, count: int = 3) -> list[Params]:
    """Best guesses that keep a distance from each other."""
    chosen: list[Params] = []
    for guess in sorted(guesses, key=cost):
        if all(math.dist(guess, other) > 2 * GRID for other in chosen):
            chosen.append(guess)
    return chosen[:count]


def descend(
    cost: Cost, start: Params, step: float, finest: float, coupled: Sequence[tuple[int, int]] = ()
) -> tuple[Params, float]:
    """Minimize a cost by pattern search along the axes, halving the step until it is below `finest`.

    coupled: pairs of axes that are also searched diagonally, for parameters that compensate each other.
    Returns the parameters and their cost.
    """
    axes = np.eye(len(start))
    directions = [*axes, *(axes[i] + sign * axes[j] for i, j in coupled for sign in (1, -1))]
    directions += [-direction for direction in directions]
    best = (start, cost(start))
    while step >= finest:
        moves = [tuple((np.array(best[0]) + step * direction).tolist()) for direction in directions]
        move = min(((params, cost(params)) for params in moves), key=lambda pair: pair[1])
        if move[1] < best[1]:
            best = move
        else:
            step /= 2
    return best


def fit_quality(
    result: Image.Image, motion: Motion, params: Params, drag: Drag, region: Array, draw: Draw
) -> tuple[float, float, float]:
    """Compare the result with the fitted rendering where the part is visible.

    Returns the mean difference relative to the part's contrast; the correlation of the colors there and in a
    narrow margin; and the visible area relative to that in the true result.
    """
    background = blur(draw(motion.removed(), SIDE))
    truth = blur(draw(drag.after, SIDE))
    fitted = blur(draw(motion.apply(params), SIDE))
    image = blur(result)
    contrast = np.abs(fitted - background).mean(axis=-1)
    visible = (contrast > CONTRAST) & region
    visible_in_truth = (np.abs(truth - background).mean(axis=-1) > CONTRAST) & region
    if not visible.any():
        return 1.0, 0.0, 0.0
    misfit = np.abs(image - fitted).mean(axis=-1)[visible].mean() / contrast[visible].mean()
    grown = (np.asarray(Image.fromarray(visible).convert("L").filter(ImageFilter.MaxFilter(7))) > 0) & region
    correlation = color_correlation(fitted[grown], image[grown])
    return float(misfit), correlation, float(visible.sum() / visible_in_truth.sum())


def color_correlation(one: Array, other: Array) -> float:
    """Correlation of two sets of colors, (N, 3) each, centered per channel."""
    one = one - one.mean(axis=0)
    other = other - other.mean(axis=0)
    return float((one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum() + 1e-9))
