"""What a picture shows: which things, in which colours, at what time of day and on what ground.

The sky and the ground are told by their colours. What they do not explain is searched for things: first with
a small picture of every kind, size and colour at every place, then by drawing the likely ones anew until they
fit. Nothing is known beforehand but how scenes are drawn.
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

from minidrag.bench.placement import CAP, CONTRAST, apart, descend
from minidrag.tiny.picture import AIRS, GROUNDS, SIDE, Air, Scene, layers
from minidrag.tiny.scenes import LIGHT_X, LIGHT_Y, PEAK_HEIGHT
from minidrag.tiny.things import COLORS, DRAW, RISE, Array, Object, array

SMALL, MIDDLE = 32, 64  # sides of the pictures in which things are searched, and fitted
UP, DOWN, ASIDE = 21, 4, 11  # the window around a thing's foot, in pixels of the small picture
HORIZONS = np.arange(0.44, 0.71, 0.02)
LOW = 0.4  # where the foot of a thing is at most, in the picture's height
LIKELY, TRIED = 20, 4  # combinations of kind and colour that are compared, and of them fitted
MOST = 3  # things that are looked for; a scene has one or two
LEAST_GAIN = 0.3  # of 255, over the whole picture: the least thing, half hidden, explains 0.4
SEEN = 0.4  # of its area that a thing must show
UNLIKE = (
    0.7  # most error that may be left where it shows, over that without it; 0.3 at most in a true picture
)
LIGHT = 0.075  # radius of the sun or moon
# Numbers that a kind has beside place and size, with the change that shows as much as a pixel's move.
FREE = {"face": {"gaze": 0.2, "smile": 0.1}} | dict.fromkeys(RISE, {"stretch": 0.04})
LIMITS = {"x": (0, 1), "y": (0.3, 1.1), "size": (0.15, 0.55), "stretch": (0.5, 1.8), "gaze": (-1.5, 1.5)}
LIMITS |= {"smile": (-0.1, 1.2)}


@dataclass(frozen=True)
class Seen:
    """What was found in a picture; objects from left to right."""

    time: str
    ground: str
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Backdrop:
    """A picture without its things: at each pixel the colour of sky, mountain or ground nearest to it.

    picture, nearest: (H, W, 3), 0 to 255.
    """

    time: str
    ground: str
    horizon: float
    picture: Array
    nearest: Array

    def empty(self) -> Scene:
        return Scene(self.time, 0.5, -1.0, (), self.horizon, self.ground, ())

    def draw(self, things: tuple[Object, ...]) -> Array:
        """The backdrop with things on it."""
        drawn = self.nearest.copy()
        for (kind, _), draw in layers(replace(self.empty(), objects=things)):
            if kind == "object":
                draw(drawn)
        return np.clip(drawn, 0, 255)

    def cost(self, things: tuple[Object, ...]) -> float:
        """How much the things leave unexplained, the mean over the picture in 1 of 255."""
        return float(apart(self.draw(things), self.picture).mean())


def shrunk(picture: Image.Image, side: int) -> Array:
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX), dtype=np.float32)


def backdrop(picture: Array, time: str, ground: str, horizon: float) -> Backdrop:
    """The backdrop for a given time, ground and horizon. picture: (side, side, 3)."""
    side, air = len(picture), AIRS[time]
    row = (np.arange(side) + 0.5)[:, None] / side
    above, low = row < horizon, (row < horizon) & (row > horizon - PEAK_HEIGHT[1])
    bands = [np.interp(row / horizon, (0, 0.55, 1), channel) for channel in zip(*air.sky, strict=True)]
    sky, light = np.concatenate(bands, axis=1), array(air.light)  # (H, 3)
    far, near = (array(color) * array(air.ground_tint) for color in GROUNDS[ground])
    soil = far + (near - far) * np.clip((row - horizon) / 0.5, 0, 1)
    away = distance_to_light(difference(sky, picture), difference(light, picture))
    disc, glow = above & (away < LIGHT + 0.5 / side), above & (away < 3 * LIGHT)
    # Colours, and where each of them may be.
    colors = [(sky, above), (soil, ~above), (light, disc), (light * 0.86, disc)]
    colors += [(air_color * np.float32(shade), low) for air_color, shade in rocks(air)]
    colors += [(sky + share * (light - sky), glow) for share in (0.2, 0.4, 0.6, 0.8)]
    far_off = np.stack([np.where(allowed, difference(color, picture), 1e6) for color, allowed in colors])
    choices = np.stack([np.broadcast_to(color, sky.shape) for color, _ in colors])  # (N, H, 3)
    nearest = choices[far_off.argmin(axis=0), np.arange(side)[:, None]]  # (N, H, 3) -> (H, W, 3)
    return Backdrop(time, ground, horizon, picture, nearest.astype(np.float32))


def rocks(air: Air) -> product:
    """The colours of a mountain and its snow, and the shades of both: on the light side and on the other."""
    return product((array(air.mountain), array(air.snowcap)), (1.0, 0.8, 0.86))


def difference(color: Array, picture: Array) -> Array:
    """How far pixels are from a colour, or one per row: (3,) or (H, 3), and (H, W, 3) -> (H, W)."""
    return np.abs(picture - color.reshape(-1, 1, 3)).mean(axis=-1)


def distance_to_light(as_sky: Array, as_light: Array) -> Array:
    """How far every pixel is from the middle of the sun or moon, in sides of the picture: (H, W).

    It is where a disc of its size is least like the sky and most like light. as_sky, as_light: (H, W), the
    pixels' differences from both.
    """
    maps = distances(len(as_sky))
    gain = np.minimum(as_sky, CAP) - np.minimum(as_light, CAP)
    return maps[((maps < LIGHT) * gain).sum(axis=(1, 2)).argmax()]


@cache
def distances(side: int) -> Array:
    """Distances of all pixels to each place where the sun or moon can be: (places, side, side)."""
    at = (np.arange(side) + 0.5) / side
    (left, right), (top, low) = LIGHT_X, LIGHT_Y
    places = [(x, y) for y in np.arange(top, low, 0.03) for x in np.arange(left, right, 0.03)]
    return np.stack([np.hypot(at[:, None] - y, at - x) for x, y in places]).astype(np.float32)


def identify(picture: Image.Image) -> Seen:
    """Names what a picture of a scene shows, however it came about. picture: RGB, square."""
    small, middle = shrunk(picture, SMALL), shrunk(picture, MIDDLE)
    possible = product(AIRS, GROUNDS, HORIZONS.tolist())
    drops = (backdrop(small, time, ground, horizon) for time, ground, horizon in possible)
    rough = min(drops, key=lambda drop: drop.cost(()))
    fine = backdrop(middle, rough.time, rough.ground, rough.horizon)
    things: tuple[Object, ...] = ()
    while len(things) < MOST:
        thing = best_thing(rough, fine, things)
        if fine.cost(things) - fine.cost((*things, thing)) < LEAST_GAIN:
            break
        things = (*things, thing)
    if len(things) > 1:  # the first was found before the others were known
        things = (best_thing(rough, fine, things[1:]), *things[1:])
    shown = [thing for i, thing in enumerate(things) if is_shown(fine, things[:i] + things[i + 1 :], thing)]
    return Seen(fine.time, fine.ground, tuple(sorted(shown, key=lambda thing: thing.x)))


def is_shown(fine: Backdrop, others: tuple[Object, ...], thing: Object) -> bool:
    """Whether the picture is like the thing where that is seen, and enough of it is seen.

    What is a thing to nobody's eye, such as a bulge of another or a stain, fails in one or the other.
    """
    without, with_it = fine.draw(others), fine.draw((*others, thing))
    seen = np.abs(with_it - without).mean(axis=-1) > CONTRAST
    if seen.sum() < SEEN * covered(fine, (thing,)).sum():
        return False
    error, before = (np.abs(drawn - fine.picture)[seen].mean() for drawn in (with_it, without))
    return bool(error < UNLIKE * before)


def best_thing(rough: Backdrop, fine: Backdrop, others: tuple[Object, ...]) -> Object:
    """The thing that explains most of a picture beside those that are known."""
    compared = sorted(likely(rough, others), key=lambda thing: fine.cost((*others, thing)))
    fitted = [fit_thing(fine, others, thing) for thing in compared[:TRIED]]
    return min(fitted, key=lambda thing: fine.cost((*others, thing)))


def fit_thing(fine: Backdrop, others: tuple[Object, ...], thing: Object) -> Object:
    """The thing with the place and the proportions that fit best."""
    fields = {"x": 1 / SIDE, "y": 1 / SIDE, "size": 1 / SIDE} | FREE.get(thing.kind, {})

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
def samples() -> tuple[Object, ...]:
    """Every kind and colour in some sizes and proportions."""
    made = []
    for kind, color in product(DRAW, COLORS):
        face = kind == "face"
        sizes = (0.34, 0.38, 0.43) if face else (0.23, 0.27, 0.32, 0.38)
        stretches = (0.8, 1.05, 1.3) if kind in RISE else (1.0,)
        gazes, smiles = ((-0.7, 0.0, 0.7), (0.2, 0.8)) if face else ((0.0,), (0.0,))
        for numbers in product(sizes, stretches, gazes, smiles):
            made.append(Object(kind, color, 0.5, 0.75, *numbers))
    return tuple(made)


@cache
def kernels(time: str) -> Tensor:
    """What `likely` compares the small picture with, for each of `samples`: (N, 9, UP + DOWN, 2 ASIDE)."""
    column, row, made = SMALL // 2, SMALL * 3 // 4, []
    for thing in samples():
        draw = layers(Scene(time, 0.5, -1.0, (), 0.5, "grass", (thing,)))[-1][1]
        black, white = np.zeros((SMALL, SMALL, 3), np.float32), np.full((SMALL, SMALL, 3), 255, np.float32)
        draw(black)
        draw(white)
        cover, color = (255 + black - white)[..., :1] / 255, np.minimum(black, 255) / 255
        squared = (color * color).sum(axis=-1, keepdims=True)
        made.append(np.concatenate([cover, cover * cover, color, cover * color, squared], axis=-1))
    window = np.stack(made)[:, row - UP : row + DOWN, column - ASIDE : column + ASIDE]
    return torch.from_numpy(window.transpose(0, 3, 1, 2).copy())  # (N, h, w, 9) -> (N, 9, h, w)


def likely(rough: Backdrop, others: tuple[Object, ...]) -> list[Object]:
    """The likeliest things, each of another kind or colour, where they explain most of the small picture.

    With the backdrop b, the picture p, and a thing that covers a share a of a pixel and adds the colour t to
    it, the squared error falls by |p - b|^2 - |p - (1 - a) b - t|^2, summed up where no other thing stands.
    """
    drop = torch.from_numpy(rough.draw(others) / 255)
    left = torch.from_numpy(rough.picture / 255) - drop
    free = 1 - torch.from_numpy(covered(rough, others))[..., None]
    parts = [-2 * (left * drop).sum(-1, keepdim=True), -(drop * drop).sum(-1, keepdim=True)]
    parts += [2 * left, 2 * drop, -torch.ones(SMALL, SMALL, 1)]
    inputs = (torch.cat(parts, dim=-1) * free).permute(2, 0, 1)[None]  # (H, W, 9) -> (1, 9, H, W)
    highest = int(LOW * SMALL)
    inputs = pad(inputs, (ASIDE, ASIDE, UP, DOWN))[:, :, highest:]
    gains = conv2d(inputs, kernels(rough.time))[0]  # (N, rows, columns), of the foot
    best, place = gains.flatten(1).max(dim=1)
    chosen: dict[tuple[str, str], Object] = {}
    for index in best.argsort(descending=True).tolist():
        thing, (row, column) = samples()[index], divmod(int(place[index]), gains.shape[2])
        thing = replace(thing, x=column / SMALL, y=(row + highest) / SMALL)
        chosen.setdefault((thing.kind, thing.color), thing)
        if len(chosen) == LIKELY:
            break
    return list(chosen.values())


def covered(drop: Backdrop, things: tuple[Object, ...]) -> Array:
    """Which share of each pixel things hide: (H, W)."""
    white, black = (
        replace(drop, nearest=np.full_like(drop.nearest, level)).draw(things)[..., 0] for level in (255, 0)
    )
    return 1 - (white - black) / 255
