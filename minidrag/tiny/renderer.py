"""Scene renderer: sky, sun or moon, mountains, ground and objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from minidrag.tiny.objects import COLORS, DRAW, Array, Brush, Color, Object, array

SIDE = 128
Part = tuple[str, int]  # "light", "peak", "ground" or "object", and its index in the scene
GROUNDS: dict[str, tuple[Color, Color]] = {  # far, near
    "grass": ((158, 204, 106), (104, 168, 78)),
    "sand": ((244, 222, 170), (222, 186, 124)),
    "snow": ((242, 247, 252), (206, 220, 238)),
}


@dataclass(frozen=True)
class Palette:
    """Colors of one time of day."""

    phrase: str  # in captions
    sky: tuple[Color, Color, Color]  # top, middle, horizon
    light: Color
    mountain: Color
    snowcap: Color
    ground_tint: tuple[float, float, float]  # multiplies the ground's colors
    object_tint: tuple[float, float, float]  # multiplies the objects' colors


PALETTES = {
    "day": Palette(
        "by day",
        ((88, 156, 228), (142, 196, 242), (214, 236, 248)),
        (255, 236, 150),
        (128, 148, 188),
        (246, 249, 252),
        (1.0, 1.0, 1.0),
        (1.0, 1.0, 1.0),
    ),
    "dusk": Palette(
        "at dusk",
        ((92, 84, 156), (220, 132, 146), (255, 206, 146)),
        (255, 226, 140),
        (132, 98, 146),
        (246, 196, 188),
        (0.94, 0.78, 0.76),
        (0.98, 0.95, 0.95),
    ),
    "night": Palette(
        "at night",
        ((20, 26, 66), (38, 50, 104), (74, 90, 150)),
        (246, 244, 224),
        (56, 66, 116),
        (134, 148, 196),
        (0.50, 0.50, 0.63),
        (0.90, 0.92, 0.97),
    ),
}


@dataclass(frozen=True)
class Scene:
    """Parameters of a rendered scene. Lengths are fractions of the image side; y points down."""

    time: str  # key of PALETTES
    light_x: float  # center of the sun or moon
    light_y: float
    peaks: tuple[tuple[float, float], ...]  # (x, height above the horizon), back to front
    horizon: float
    ground: str  # key of GROUNDS
    objects: tuple[Object, ...]  # in any order: a lower foot is nearer to the viewer

    def with_peak(self, index: int, x: float, height: float) -> Scene:
        """The scene with another peak in the place of one."""
        return replace(self, peaks=(*self.peaks[:index], (x, height), *self.peaks[index + 1 :]))

    def with_object(self, index: int, thing: Object) -> Scene:
        """The scene with another object in the place of one."""
        return replace(self, objects=(*self.objects[:index], thing, *self.objects[index + 1 :]))


def _draw_light(canvas: Array, scene: Scene) -> None:
    brush = Brush.at(canvas, scene.light_x, scene.light_y, 0.075, (-3, 3, -3, 3))
    light = array(PALETTES[scene.time].light)
    glow = np.clip(1 - (brush.ellipse(0, 0, 1, 1) + 1) / np.float32(3), 0, 1)
    brush.blend(glow * glow * np.float32(0.75), light)
    brush.fill(brush.ellipse(0, 0, 1, 1), light)
    if scene.time == "night":
        craters = np.minimum(brush.ellipse(-0.3, 0.25, 0.3, 0.3), brush.ellipse(0.35, -0.3, 0.24, 0.24))
        brush.fill(craters, light * np.float32(0.86))


def _draw_peak(canvas: Array, palette: Palette, x: float, height: float, horizon: float) -> None:
    half = 0.10 + 0.95 * height
    brush = Brush.at(canvas, x, horizon - height, 1.0, (-1.3 * half, 1.3 * half, -height - 0.06, 0.02))
    slope = height / half
    # The square root rounds the tip: a sharp one would be thinner than a pixel.
    sides = np.sqrt(brush.u * brush.u + np.float32(1e-4)) - np.float32(1e-2)
    distance = (sides * np.float32(slope) + brush.v) * np.float32(1 / np.hypot(1, slope))
    brush.fill(distance, array(palette.mountain))
    right = np.maximum(distance, -brush.u - brush.v * np.float32(0.2))
    brush.fill(right, array(palette.mountain) * np.float32(0.8))
    snow = np.maximum(distance, -brush.v - np.float32(0.3 * height))
    brush.fill(snow, array(palette.snowcap))
    brush.fill(np.maximum(snow, right), array(palette.snowcap) * np.float32(0.86))


def _draw_ground(canvas: Array, scene: Scene) -> None:
    brush = Brush.at(canvas, 0.5, scene.horizon, 1.0, (-1, 1, -1, 0.02))
    far, near = (array(color) * array(PALETTES[scene.time].ground_tint) for color in GROUNDS[scene.ground])
    depth = np.clip(-brush.v / np.float32(0.5), 0, 1)[..., None]
    brush.fill(brush.v + brush.u * brush.u * np.float32(0.08), far + (near - far) * depth)


def _draw_object(canvas: Array, scene: Scene, thing: Object) -> None:
    tint = array(PALETTES[scene.time].object_tint)
    bounds = (-0.68, 0.68, -0.16, 1.0 * thing.stretch + 0.4)
    brush = Brush.at(canvas, thing.x, thing.y, thing.size, bounds)
    DRAW[thing.kind](brush, thing, array(COLORS[thing.color]) * tint, tint)


def layers(scene: Scene) -> list[tuple[Part, Callable[[Array], None]]]:
    """Parts drawn over the sky, back to front, each with its draw function."""
    palette = PALETTES[scene.time]
    light = partial(_draw_light, scene=scene)
    parts: list[tuple[Part, Callable[[Array], None]]] = [(("light", 0), light)]
    for index, (x, height) in enumerate(scene.peaks):
        peak = partial(_draw_peak, palette=palette, x=x, height=height, horizon=scene.horizon)
        parts.append((("peak", index), peak))
    parts.append((("ground", 0), partial(_draw_ground, scene=scene)))
    for index, thing in sorted(enumerate(scene.objects), key=lambda pair: pair[1].y):
        parts.append((("object", index), partial(_draw_object, scene=scene, thing=thing)))
    return parts


def render(scene: Scene, size: int = SIDE) -> Image.Image:
    """Render a scene as an RGB image of size x size pixels. Deterministic to the byte."""
    canvas = sky(scene, size)
    for _, draw in layers(scene):
        draw(canvas)
    return Image.fromarray(np.clip(canvas + np.float32(0.5), 0, 255).astype(np.uint8))


def sky(scene: Scene, size: int) -> Array:
    """Sky of a scene: (size, size, 3)."""
    depth = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size * scene.horizon)
    channels = zip(*PALETTES[scene.time].sky, strict=True)
    bands = [np.interp(depth, (0, 0.55, 1), channel) for channel in channels]
    return np.repeat(np.stack(bands, axis=-1).astype(np.float32)[:, None], size, axis=1)


def layer_map(scene: Scene) -> Array:
    """Index into `layers` of the layer that each pixel shows, -1 for sky: (SIDE, SIDE).

    A layer claims the pixels that it covers by more than half, so shadows and the light's glow claim none.
    """
    labels = np.full((SIDE, SIDE), -1)
    for index, (_, draw) in enumerate(layers(scene)):
        black = np.zeros((SIDE, SIDE, 3), np.float32)
        white = np.full((SIDE, SIDE, 3), 255, np.float32)
        draw(black)
        draw(white)
        labels[(white - black)[..., 0] < 128] = index
    return labels
