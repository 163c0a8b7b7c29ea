"""Objects of a scene, drawn as signed distance functions.

A shape covers clip(0.5 - distance, 0, 1) of a pixel, with the signed distance to its edge in pixels. The
image is therefore continuous in every parameter: a shift by 0.1 pixels changes an edge pixel by 10 %.
Supersampling would round the shift to its grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Color = tuple[int, int, int]

# In units of the object's size.
RISE = {"box": 0.75, "tree": 0.85, "house": 0.55}  # height of the top at stretch 1
LOOK = 0.10  # pupil offset at gaze 1
MOUTH = 0.13  # half the mouth's width at smile 0
SMILE = 0.20  # added to it at smile 1

COLORS: dict[str, Color] = {
    "red": (216, 48, 46),
    "orange": (244, 134, 34),
    "yellow": (252, 212, 58),
    "green": (34, 142, 76),
    "turquoise": (62, 202, 200),
    "blue": (46, 92, 212),
    "purple": (138, 70, 188),
    "pink": (248, 138, 186),
    "white": (246, 244, 240),
    "black": (56, 57, 66),
}


@dataclass(frozen=True)
class Object:
    """An object on the ground. Lengths are fractions of the image side."""

    kind: str  # key of DRAW
    color: str  # key of COLORS
    x: float  # center of the foot
    y: float
    size: float  # approximate width
    stretch: float = 1.0  # of a box, tree or house: its height relative to the usual one
    gaze: float = 0.0  # of a face: -1 (left) to 1 (right)
    smile: float = 0.0  # of a face: 0 (narrow mouth) to 1 (wide mouth)


@dataclass(frozen=True)
class Brush:
    """A region of the canvas with local coordinates: u points right, v points up."""

    area: Array  # (h, w, 3), a view of the canvas
    u: Array  # (1, w)
    v: Array  # (h, 1)
    pixels: float  # per unit of u and v

    @classmethod
    def at(cls, canvas: Array, x: float, y: float, unit: float, bounds: Sequence[float]) -> Brush:
        """Brush with its origin at (x, y), cropped to bounds = (left, right, down, up) in units."""
        side = canvas.shape[0]
        left, right, down, up = bounds
        columns = slice(max(0, int((x + left * unit) * side) - 1), max(0, int((x + right * unit) * side) + 2))
        rows = slice(max(0, int((y - up * unit) * side) - 1), max(0, int((y - down * unit) * side) + 2))
        centers = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
        u = (centers[None, columns] - np.float32(x)) / np.float32(unit)
        v = (np.float32(y) - centers[rows, None]) / np.float32(unit)
        return cls(canvas[rows, columns], u, v, unit * side)

    def blend(self, cover: Array, color: Array) -> None:
        """Blend a color into the area. cover: (h, w), 0 to 1. color: broadcasts to (h, w, 3)."""
        self.area[...] += cover[..., None] * (color - self.area)

    def fill(self, distance: Array, color: Array) -> None:
        """Fill where `distance` (in units) is negative, with an edge one pixel wide."""
        self.blend(np.clip(np.float32(0.5) - distance * np.float32(self.pixels), 0, 1), color)

    def shade(self, color: Array, light: float, dark: float, rise: float, height: float) -> Array:
        """Color times a ramp from `light` (upper left) to `dark` (lower right): (h, w, 3)."""
        ramp = np.clip((self.v - np.float32(rise)) / np.float32(height) - self.u, -1, 1) * np.float32(0.5)
        return color * (np.float32(dark) + np.float32(light - dark) * (ramp + np.float32(0.5)))[..., None]

    def ellipse(self, u: float, v: float, wide: float, high: float) -> Array:
        """Distance to an ellipse with this center and these semi-axes; exact for a circle."""
        across = (self.u - np.float32(u)) / np.float32(wide)
        along = (self.v - np.float32(v)) / np.float32(high)
        return (np.sqrt(across * across + along * along) - np.float32(1)) * np.float32(min(wide, high))

    def box(self, left: float, right: float, low: float, high: float) -> Array:
        """Distance to an axis-aligned rectangle."""
        across = np.abs(self.u - np.float32((left + right) / 2)) - np.float32((right - left) / 2)
        along = np.abs(self.v - np.float32((low + high) / 2)) - np.float32((high - low) / 2)
        return np.maximum(across, along)

    def polygon(self, *corners: tuple[float, float]) -> Array:
        """Distance to a convex polygon. corners: counterclockwise."""
        sides = []
        for (u, v), (next_u, next_v) in zip(corners, (*corners[1:], corners[0]), strict=True):
            du = next_u - u
            dv = next_v - v
            length = float(np.hypot(du, dv))
            across = (self.u - np.float32(u)) * np.float32(dv / length)
            along = (self.v - np.float32(v)) * np.float32(-du / length)
            sides.append(across + along)
        distance = sides[0]
        for side in sides[1:]:
            distance = np.maximum(distance, side)
        return distance

    def shadow(self, wide: float) -> None:
        """Blend a soft dark ellipse around the origin."""
        distance = self.ellipse(0.04, 0.0, wide, 0.1) * np.float32(10)
        self.blend(np.clip(np.float32(0.25) - distance, 0, 1) * np.float32(0.34), array((24, 28, 52)))


def array(color: Sequence[float]) -> Array:
    return np.array(color, dtype=np.float32)


def _accent(thing: Object, tint: Array) -> Array:
    """Color of bands, spots and ribbons: cream, or gray on white objects."""
    return array((176, 188, 212) if thing.color == "white" else (255, 248, 230)) * tint


def _ball(brush: Brush, thing: Object, color: Array, tint: Array) -> None:
    brush.shadow(0.5)
    disc = brush.ellipse(0, 0.5, 0.5, 0.5)
    brush.fill(disc, brush.shade(color, 1.12, 0.70, 0.5, 1))
    band = np.abs(brush.v - np.float32(0.44) - brush.u * brush.u * np.float32(0.4)) - np.float32(0.11)
    brush.fill(np.maximum(disc, band), brush.shade(_accent(thing, tint), 1.05, 0.78, 0.5, 1))


def _box(brush: Brush, thing: Object, color: Array, tint: Array) -> None:
    top = RISE["box"] * thing.stretch
    brush.shadow(0.56)
    side = ((0.28, 0.0), (0.5, 0.16), (0.5, top + 0.16), (0.28, top))
    lid = ((-0.5, top), (0.28, top), (0.5, top + 0.16), (-0.28, top + 0.16))
    brush.fill(brush.polygon(*side), color * np.float32(0.62))
    brush.fill(brush.polygon(*lid), np.minimum(color * np.float32(1.1) + np.float32(26), 255))
    brush.fill(brush.box(-0.5, 0.28, 0.0, top), color * np.float32(0.9))
    brush.fill(brush.box(-0.21, -0.01, 0.0, top), _accent(thing, tint) * np.float32(0.94))


def _tree(brush: Brush, thing: Object, color: Array, tint: Array) -> None:
    crown = RISE["tree"] * thing.stretch - 0.23
    brush.shadow(0.36)
    brush.fill(brush.box(-0.09, 0.09, 0.0, crown), array((126, 84, 58)) * tint)
    leaves = np.minimum(brush.ellipse(-0.24, crown, 0.27, 0.27), brush.ellipse(0.24, crown, 0.27, 0.27))
    leaves = np.minimum(leaves, brush.ellipse(0, crown + 0.25, 0.32, 0.32))
    leaves = np.minimum(leaves, brush.box(-0.24, 0.24, crown - 0.25, crown))
    brush.fill(leaves, brush.shade(color, 1.14, 0.68, crown + 0.12, 0.9))


def _house(brush: Brush, thing: Object, color: Array, tint: Array) -> None:
    eaves = RISE["house"] * thing.stretch
    brush.shadow(0.52)
    brush.fill(brush.box(-0.42, 0.42, 0.0, eaves + 0.05), brush.shade(color, 1.08, 0.82, 0.3, 0.9))
    roof = array((128, 80, 78) if thing.color != "black" else (160, 96, 84)) * tint
    brush.fill(brush.polygon((-0.54, eaves), (0.54, eaves), (0.0, eaves + 0.45)), roof)
    brush.fill(brush.box(-0.28, -0.06, 0.0, 0.36), roof * np.float32(0.8))
    brush.fill(brush.box(0.08, 0.30, 0.17, 0.39), array((255, 232, 158)) * tint)


def _face(brush: Brush, thing: Object, color: Array, tint: Array) -> None:
    brush.shadow(0.5)
    brush.fill(brush.ellipse(0, 0.5, 0.5, 0.5), brush.shade(color, 1.08, 0.78, 0.5, 1))
    eyes = np.minimum(brush.ellipse(-0.21, 0.63, 0.18, 0.19), brush.ellipse(0.21, 0.63, 0.18, 0.19))
    brush.fill(eyes, array((255, 255, 255) if thing.color != "white" else (172, 200, 240)) * tint)
    look = LOOK * thing.gaze
    left = brush.ellipse(look - 0.21, 0.63, 0.08, 0.1)
    right = brush.ellipse(look + 0.21, 0.63, 0.08, 0.1)
    pupils = np.minimum(left, right)
    brush.fill(pupils, array((34, 32, 44)) * tint)
    lips = brush.ellipse(0, 0.34, MOUTH + SMILE * thing.smile, 0.11 + 0.1 * thing.smile)
    mouth = array((112, 26, 42) if thing.color != "black" else (236, 110, 112)) * tint
    brush.fill(np.maximum(lips, brush.v - np.float32(0.34)), mouth)


def _mushroom(brush: Brush, thing: Object, color: Array, tint: Array) -> None:
    brush.shadow(0.3)
    stem = array((250, 236, 212)) * tint
    brush.fill(brush.box(-0.15, 0.15, 0.0, 0.5), brush.shade(stem, 1.0, 0.8, 0.2, 0.6))
    cap = np.maximum(brush.ellipse(0, 0.38, 0.5, 0.5), np.float32(0.38) - brush.v)
    brush.fill(cap, brush.shade(color, 1.1, 0.72, 0.6, 0.9))
    spots = np.minimum(brush.ellipse(-0.24, 0.54, 0.09, 0.085), brush.ellipse(0.26, 0.52, 0.08, 0.075))
    spots = np.minimum(spots, brush.ellipse(0.03, 0.7, 0.1, 0.08))
    brush.fill(spots, _accent(thing, tint))


def _car(brush: Brush, thing: Object, color: Array, tint: Array) -> None:
    brush.shadow(0.6)
    cabin = brush.polygon((-0.36, 0.36), (0.32, 0.36), (0.18, 0.66), (-0.24, 0.66))
    brush.fill(cabin, color * np.float32(0.86))
    glass = array((196, 226, 244) if thing.color != "turquoise" else (236, 244, 250)) * tint
    brush.fill(brush.polygon((-0.24, 0.38), (0.22, 0.38), (0.13, 0.58), (-0.18, 0.58)), glass)
    body = np.minimum(brush.box(-0.5, 0.5, 0.12, 0.3), brush.ellipse(0, 0.3, 0.6, 0.14))
    ends = np.minimum(brush.ellipse(-0.47, 0.25, 0.13, 0.15), brush.ellipse(0.47, 0.25, 0.13, 0.15))
    body = np.minimum(body, ends)
    brush.fill(body, brush.shade(color, 1.1, 0.82, 0.25, 0.6))
    wheels = np.minimum(brush.ellipse(-0.3, 0.13, 0.14, 0.14), brush.ellipse(0.3, 0.13, 0.14, 0.14))
    brush.fill(wheels, array((38, 38, 48)) * tint)
    brush.fill(wheels + np.float32(0.08), array((214, 218, 226)) * tint)


DRAW: dict[str, Callable[[Brush, Object, Array, Array], None]] = {
    "ball": _ball,
    "box": _box,
    "tree": _tree,
    "house": _house,
    "face": _face,
    "mushroom": _mushroom,
    "car": _car,
}


def grips(thing: Object) -> dict[str, tuple[float, float]]:
    """Candidate handle points of an object by name, each on a distinct detail.

    Returns (u, v) relative to the foot, in units of the object's size, v up. Stretch moves only "top".
    """
    top = RISE.get(thing.kind, 0.0) * thing.stretch
    look = LOOK * thing.gaze
    corner = MOUTH + SMILE * thing.smile - 0.03
    return {
        "ball": {"band": (0.0, 0.46), "left": (-0.34, 0.48), "right": (0.34, 0.48)},
        "box": {"top": (-0.11, top - 0.05), "ribbon": (-0.11, 0.3), "foot": (-0.11, 0.1)},
        "tree": {"top": (0.0, top), "trunk": (0.0, 0.16), "foot": (0.0, 0.1)},
        "house": {
            "window": (0.19, 0.28),
            "door": (-0.17, 0.2),
            "top": (0.0, top + 0.2),
            "foot": (-0.17, 0.1),
        },
        "face": {
            "mouth": (0.0, 0.29),
            "left pupil": (look - 0.21, 0.63),
            "right pupil": (look + 0.21, 0.63),
            "left corner": (-corner, 0.32),
            "right corner": (corner, 0.32),
        },
        "mushroom": {"spot": (0.03, 0.7), "left spot": (-0.24, 0.54), "right spot": (0.26, 0.52)},
        "car": {"left wheel": (-0.3, 0.13), "right wheel": (0.3, 0.13), "window": (0.0, 0.48)},
    }[thing.kind]
