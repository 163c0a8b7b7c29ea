"""Identify the contents of a scene image: objects and their colors, time of day, ground.

Sky and ground are recognized by their colors. To find objects in the remaining pixels, templates of every
kind, size and color are matched at every position, and the best candidates are fitted by rendering.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, pad

from minidrag.bench.placement import CAP, CONTRAST, capped_difference, descend, downsample
from minidrag.tiny.picture import GROUNDS, PALETTES, SIDE, Palette, Scene, layers
from minidrag.tiny.scenes import LIGHT_X, LIGHT_Y, PEAK_HEIGHT
from minidrag.tiny.things import COLORS, DRAW, RISE, Array, Object, array

SEARCH_SIDE, FIT_SIDE = 32, 64  # image sides for template matching and for fitting
UP, DOWN, ASIDE = 21, 4, 11  # template extent around an object's foot, in pixels at SEARCH_SIDE
HORIZONS = np.arange(0.44, 0.71, 0.02)
HIGHEST_FOOT = 0.4  # smallest y of an object's foot
COMPARED, FITTED = 20, 4  # candidates that are rendered once, and the best of them that are fitted
MAX_OBJECTS = 3  # scenes have one or two
MIN_GAIN = 0.3  # of 255, mean over the image; the smallest object, half hidden, explains 0.4
MIN_VISIBLE = 0.4  # fraction of an object's area
MAX_ERROR_RATIO = 0.7  # error with the object over error without it; at most 0.3 in rendered images
LIGHT_RADIUS = 0.075
# Parameters besides position and size, with the step that changes the image about as much as a 1-pixel shift.
SHAPE_STEPS = {"face": {"gaze": 0.2, "smile": 0.1}} | dict.fromkeys(RISE, {"stretch": 0.04})
LIMITS = {"x": (0, 1), "y": (0.3, 1.1), "size": (0.15, 0.55), "stretch": (0.5, 1.8), "gaze": (-1.5, 1.5)}
LIMITS |= {"smile": (-0.1, 1.2)}


@dataclass(frozen=True)
class Contents:
    """Identified contents of an image."""

    time: str
    ground: str
    objects: tuple[Object, ...]  # from left to right


@dataclass(frozen=True)
class Backdrop:
    """An image and its closest explanation without objects."""

    time: str
    ground: str
    horizon: float
    image: Array  # (H, W, 3), 0 to 255
    nearest: Array  # (H, W, 3), for each pixel the nearest color of sky, light, mountain or ground

    def empty(self) -> Scene:
        return Scene(self.time, 0.5, -1.0, (), self.horizon, self.ground, ())

    def draw(self, things: tuple[Object, ...]) -> Array:
        """Backdrop with objects: (H, W, 3), 0 to 255."""
        canvas = self.nearest.copy()
        for (kind, _), draw in layers(replace(self.empty(), objects=things)):
            if kind == "object":
                draw(canvas)
        return np.clip(canvas, 0, 255)

    def cost(self, things: tuple[Object, ...]) -> float:
        """Mean capped difference between the image and the backdrop with objects, of 255."""
        return float(capped_difference(self.draw(things), self.image).mean())


def make_backdrop(image: Array, time: str, ground: str, horizon: float) -> Backdrop:
    """Build the backdrop for a time of day, ground and horizon. image: (side, side, 3)."""
    side, palette = len(image), PALETTES[time]
    row = (np.arange(side) + 0.5)[:, None] / side
    above, low = row < horizon, (row < horizon) & (row > horizon - PEAK_HEIGHT[1])
    bands = [np.interp(row / horizon, (0, 0.55, 1), channel) for channel in zip(*palette.sky, strict=True)]
    sky, light = np.concatenate(bands, axis=1), array(palette.light)  # (H, 3), (3,)
    far, near = (array(color) * array(palette.ground_tint) for color in GROUNDS[ground])
    soil = far + (near - far) * np.clip((row - horizon) / 0.5, 0, 1)
    distance = distance_to_light(color_difference(sky, image), color_difference(light, image))
    disc, glow = above & (distance < LIGHT_RADIUS + 0.5 / side), above & (distance < 3 * LIGHT_RADIUS)
    colors = [(sky, above), (soil, ~above), (light, disc), (light * 0.86, disc)]  # (color, allowed region)
    colors += [(color * np.float32(shade), low) for color, shade in mountain_colors(palette)]
    colors += [(sky + weight * (light - sky), glow) for weight in (0.2, 0.4, 0.6, 0.8)]
    costs = np.stack([np.where(allowed, color_difference(color, image), 1e6) for color, allowed in colors])
    choices = np.stack([np.broadcast_to(color, sky.shape) for color, _ in colors])  # (N, H, 3)
    nearest = choices[costs.argmin(axis=0), np.arange(side)[:, None]]  # (N, H, 3) -> (H, W, 3)
    return Backdrop(time, ground, horizon, image, nearest.astype(np.float32))


def mountain_colors(palette: Palette) -> product:
    """Colors of rock and snow, each with the shading factors of the lit and the shaded side."""
    return product((array(palette.mountain), array(palette.snowcap)), (1.0, 0.8, 0.86))


def color_difference(color: Array, image: Array) -> Array:
    """Mean absolute difference from one color or one per row: (3,) or (H, 3), (H, W, 3) -> (H, W)."""
    return np.abs(image - color.reshape(-1, 1, 3)).mean(axis=-1)


def distance_to_light(from_sky: Array, from_light: Array) -> Array:
    """Distance of every pixel to the center of the sun or moon, as a fraction of the side: (H, W).

    The center is where a disc of its size differs most from the sky and least from the light's color.
    from_sky, from_light: (H, W), the pixels' differences from these colors.
    """
    maps = light_distances(len(from_sky))
    gain = np.minimum(from_sky, CAP) - np.minimum(from_light, CAP)
    return maps[((maps < LIGHT_RADIUS) * gain).sum(axis=(1, 2)).argmax()]


@cache
def light_distances(side: int) -> Array:
    """Distance of every pixel to each possible center of the sun or moon: (centers, side, side)."""
    at = (np.arange(side) + 0.5) / side
    (left, right), (top, low) = LIGHT_X, LIGHT_Y
    centers = [(x, y) for y in np.arange(top, low, 0.03) for x in np.arange(left, right, 0.03)]
    return np.stack([np.hypot(at[:, None] - y, at - x) for x, y in centers]).astype(np.float32)


def identify(image: Image.Image) -> Contents:
    """Identify the contents of a scene image, rendered or generated. image: RGB, square."""
    small, medium = downsample(image, SEARCH_SIDE), downsample(image, FIT_SIDE)
    options = product(PALETTES, GROUNDS, HORIZONS.tolist())
    backdrops = (make_backdrop(small, time, ground, horizon) for time, ground, horizon in options)
    coarse = min(backdrops, key=lambda backdrop: backdrop.cost(()))
    fine = make_backdrop(medium, coarse.time, coarse.ground, coarse.horizon)
    things: tuple[Object, ...] = ()
    while len(things) < MAX_OBJECTS:
        thing = best_object(coarse, fine, things)
        if fine.cost(things) - fine.cost((*things, thing)) < MIN_GAIN:
            break
        things = (*things, thing)
    if len(things) > 1:  # the first one was fitted without the others
        things = (best_object(coarse, fine, things[1:]), *things[1:])
    kept = [thing for i, thing in enumerate(things) if is_visible(fine, things[:i] + things[i + 1 :], thing)]
    return Contents(fine.time, fine.ground, tuple(sorted(kept, key=lambda thing: thing.x)))


def is_visible(fine: Backdrop, others: tuple[Object, ...], thing: Object) -> bool:
    """True if enough of the object is visible and the image matches it there.

    Rejects false detections such as stains or bulges of another object.
    """
    without, with_it = fine.draw(others), fine.draw((*others, thing))
    visible = np.abs(with_it - without).mean(axis=-1) > CONTRAST
    if visible.sum() < MIN_VISIBLE * coverage(fine, (thing,)).sum():
        return False
    error, before = (np.abs(drawn - fine.image)[visible].mean() for drawn in (with_it, without))
    return bool(error < MAX_ERROR_RATIO * before)


def best_object(coarse: Backdrop, fine: Backdrop, others: tuple[Object, ...]) -> Object:
    """Object that explains the most of the image in addition to the others."""
    compared = sorted(candidates(coarse, others), key=lambda thing: fine.cost((*others, thing)))
    fitted = [fit_object(fine, others, thing) for thing in compared[:FITTED]]
    return min(fitted, key=lambda thing: fine.cost((*others, thing)))


def fit_object(fine: Backdrop, others: tuple[Object, ...], thing: Object) -> Object:
    """Fit position, size and shape parameters of an object."""
    fields = {"x": 1 / SIDE, "y": 1 / SIDE, "size": 1 / SIDE} | SHAPE_STEPS.get(thing.kind, {})

    def changed(steps: tuple[float, ...]) -> Object:
        values = {
            name: float(np.clip(getattr(thing, name) + step * unit, *LIMITS[name]))
            for (name, unit), step in zip(fields.items(), steps, strict=True)
        }
        return replace(thing, **values)

    def cost(steps: tuple[float, ...]) -> float:
        return fine.cost((*others, changed(steps)))

    coupled = [(1, 3), (2, 3)] if "stretch" in fields else [(1, 2)]
    return changed(descend(cost, (0.0,) * len(fields), 2.0, 0.5, coupled)[0])


@cache
def templates() -> tuple[Object, ...]:
    """Objects of every kind and color in several sizes and shapes."""
    found = []
    for kind, color in product(DRAW, COLORS):
        face = kind == "face"
        sizes = (0.34, 0.38, 0.43) if face else (0.23, 0.27, 0.32, 0.38)
        stretches = (0.8, 1.05, 1.3) if kind in RISE else (1.0,)
        gazes, smiles = ((-0.7, 0.0, 0.7), (0.2, 0.8)) if face else ((0.0,), (0.0,))
        for parameters in product(sizes, stretches, gazes, smiles):
            found.append(Object(kind, color, 0.5, 0.75, *parameters))
    return tuple(found)


@cache
def kernels(time: str) -> Tensor:
    """Convolution kernels that match `templates` at a time of day: (N, 9, UP + DOWN, 2 ASIDE)."""
    column, row, maps = SEARCH_SIDE // 2, SEARCH_SIDE * 3 // 4, []
    shape = SEARCH_SIDE, SEARCH_SIDE, 3
    for thing in templates():
        draw = layers(Scene(time, 0.5, -1.0, (), 0.5, "grass", (thing,)))[-1][1]
        black, white = np.zeros(shape, np.float32), np.full(shape, 255, np.float32)
        draw(black)
        draw(white)
        cover, color = (255 + black - white)[..., :1] / 255, np.minimum(black, 255) / 255
        squared = (color * color).sum(axis=-1, keepdims=True)
        maps.append(np.concatenate([cover, cover * cover, color, cover * color, squared], axis=-1))
    window = np.stack(maps)[:, row - UP : row + DOWN, column - ASIDE : column + ASIDE]
    return torch.from_numpy(window.transpose(0, 3, 1, 2).copy())  # (N, h, w, 9) -> (N, 9, h, w)


def candidates(coarse: Backdrop, others: tuple[Object, ...]) -> list[Object]:
    """Best template match of each combination of kind and color, at most COMPARED, best first.

    For backdrop b, image p and an object of coverage a and premultiplied color t, the match is the reduction
    of the squared error, |p - b|^2 - |p - (1 - a) b - t|^2, summed over pixels that no other object covers.
    """
    backdrop = torch.from_numpy(coarse.draw(others) / 255)
    residual = torch.from_numpy(coarse.image / 255) - backdrop
    free = 1 - torch.from_numpy(coverage(coarse, others))[..., None]
    parts = [-2 * (residual * backdrop).sum(-1, keepdim=True), -(backdrop * backdrop).sum(-1, keepdim=True)]
    parts += [2 * residual, 2 * backdrop, -torch.ones(SEARCH_SIDE, SEARCH_SIDE, 1)]
    inputs = (torch.cat(parts, dim=-1) * free).permute(2, 0, 1)[None]  # (H, W, 9) -> (1, 9, H, W)
    top = int(HIGHEST_FOOT * SEARCH_SIDE)
    inputs = pad(inputs, (ASIDE, ASIDE, UP, DOWN))[:, :, top:]
    gains = conv2d(inputs, kernels(coarse.time))[0]  # (N, rows, columns) of the foot
    best, position = gains.flatten(1).max(dim=1)
    chosen: dict[tuple[str, str], Object] = {}
    for index in best.argsort(descending=True).tolist():
        thing, (row, column) = templates()[index], divmod(int(position[index]), gains.shape[2])
        thing = replace(thing, x=column / SEARCH_SIDE, y=(row + top) / SEARCH_SIDE)
        chosen.setdefault((thing.kind, thing.color), thing)
        if len(chosen) == COMPARED:
            break
    return list(chosen.values())


def coverage(backdrop: Backdrop, things: tuple[Object, ...]) -> Array:
    """Fraction of each pixel that the objects cover: (H, W)."""
    white, black = (
        replace(backdrop, nearest=np.full_like(backdrop.nearest, level)).draw(things)[..., 0]
        for level in (255, 0)
    )
    return 1 - (white - black) / 255
