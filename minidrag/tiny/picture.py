"""A scene and the picture of it: sky, sun or moon, mountains, ground and the things on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from minidrag.tiny.things import COLORS, DRAW, Array, Brush, Color, Object, array

SIDE = 128
Part = tuple[str, int]  # what it is, and which of them in the scene
GROUNDS: dict[str, tuple[Color, Color]] = {  # far, near
    "grass": ((158, 204, 106), (104, 168, 78)),
    "sand": ((244, 222, 170), (222, 186, 124)),
    "snow": ((242, 247, 252), (206, 220, 238)),
}


@dataclass(frozen=True)
class Air:
    """The colours of one time of day; the tints multiply what they fall on."""

    words: str
    sky: tuple[Color, Color, Color]  # top, middle, horizon
    light: Color
    mountain: Color
    snowcap: Color
    ground_tint: tuple[float, float, float]
    object_tint: tuple[float, float, float]


AIRS = {
    "day": Air(
        "by day",
        ((88, 156, 228), (142, 196, 242), (214, 236, 248)),
        (255, 236, 150),
        (128, 148, 188),
        (246, 249, 252),
        (1.0, 1.0, 1.0),
        (1.0, 1.0, 1.0),
    ),
    "dusk": Air(
        "at dusk",
        ((92, 84, 156), (220, 132, 146), (255, 206, 146)),
        (255, 226, 140),
        (132, 98, 146),
        (246, 196, 188),
        (0.94, 0.78, 0.76),
        (0.98, 0.95, 0.95),
    ),
    "night": Air(
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
    """Everything that a picture shows, in fractions of its side; y runs downwards.

    peaks: (x, height above the horizon) of each mountain, drawn in this order. objects: the lower one's
    foot, the nearer it is, whatever the order here.
    """

    time: str
    light_x: float
    light_y: float
    peaks: tuple[tuple[float, float], ...]
    horizon: float
    ground: str
    objects: tuple[Object, ...]


def _draw_light(picture: Array, scene: Scene) -> None:
    air = AIRS[scene.time]
    brush = Brush.at(picture, scene.light_x, scene.light_y, 0.075, (-3, 3, -3, 3))
    light = array(air.light)
    glow = np.clip(1 - (brush.ellipse(0, 0, 1, 1) + 1) / np.float32(3), 0, 1)
    brush.blend(glow * glow * np.float32(0.75), light)
    brush.fill(brush.ellipse(0, 0, 1, 1), light)
    if scene.time == "night":
        craters = np.minimum(brush.ellipse(-0.3, 0.25, 0.3, 0.3), brush.ellipse(0.35, -0.3, 0.24, 0.24))
        brush.fill(craters, light * np.float32(0.86))


def _draw_peak(picture: Array, air: Air, x: float, height: float, horizon: float) -> None:
    half = 0.10 + 0.95 * height
    brush = Brush.at(picture, x, horizon - height, 1.0, (-1.3 * half, 1.3 * half, -height - 0.06, 0.02))
    slope = height / half
    # The root rounds the tip: a sharp one would be thinner than a pixel.
    sides = np.sqrt(brush.u * brush.u + np.float32(1e-4)) - np.float32(1e-2)
    distance = (sides * np.float32(slope) + brush.v) * np.float32(1 / np.hypot(1, slope))
    brush.fill(distance, array(air.mountain))
    right = np.maximum(distance, -brush.u - brush.v * np.float32(0.2))
    brush.fill(right, array(air.mountain) * np.float32(0.8))
    snow = np.maximum(distance, -brush.v - np.float32(0.3 * height))
    brush.fill(snow, array(air.snowcap))
    brush.fill(np.maximum(snow, right), array(air.snowcap) * np.float32(0.86))


def _draw_ground(picture: Array, scene: Scene) -> None:
    brush = Brush.at(picture, 0.5, scene.horizon, 1.0, (-1, 1, -1, 0.02))
    far, near = (array(color) * array(AIRS[scene.time].ground_tint) for color in GROUNDS[scene.ground])
    depth = np.clip(-brush.v / np.float32(0.5), 0, 1)[..., None]
    brush.fill(brush.v + brush.u * brush.u * np.float32(0.08), far + (near - far) * depth)


def _draw_object(picture: Array, scene: Scene, thing: Object) -> None:
    tint = array(AIRS[scene.time].object_tint)
    reach = (-0.68, 0.68, -0.16, 1.0 * thing.stretch + 0.4)
    brush = Brush.at(picture, thing.x, thing.y, thing.size, reach)
    DRAW[thing.kind](brush, thing, array(COLORS[thing.color]) * tint, tint)


def layers(scene: Scene) -> list[tuple[Part, Callable[[Array], None]]]:
    """What is drawn over the sky, from back to front, each with the function that draws it."""
    air = AIRS[scene.time]
    drawn: list[tuple[Part, Callable[[Array], None]]] = [(("light", 0), partial(_draw_light, scene=scene))]
    for index, (x, height) in enumerate(scene.peaks):
        peak = partial(_draw_peak, air=air, x=x, height=height, horizon=scene.horizon)
        drawn.append((("peak", index), peak))
    drawn.append((("ground", 0), partial(_draw_ground, scene=scene)))
    for index, thing in sorted(enumerate(scene.objects), key=lambda pair: pair[1].y):
        drawn.append((("object", index), partial(_draw_object, scene=scene, thing=thing)))
    return drawn


def render(scene: Scene, size: int = SIDE) -> Image.Image:
    """Draw a scene as an RGB picture of size x size pixels; the same scene gives the same bytes."""
    air = AIRS[scene.time]
    fall = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size * scene.horizon)
    bands = [np.interp(fall, (0, 0.55, 1), channel) for channel in zip(*air.sky, strict=True)]
    picture = np.repeat(np.stack(bands, axis=-1).astype(np.float32)[:, None], size, axis=1)
    for _, draw in layers(scene):
        draw(picture)
    return Image.fromarray(np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8))


def owners(scene: Scene) -> Array:
    """Which layer each pixel shows: (SIDE, SIDE), its place in `layers`, and -1 for bare sky.

    A layer owns the pixels that it covers by more than half, so shadows and the light's glow own none.
    """
    owner = np.full((SIDE, SIDE), -1)
    for place, (_, draw) in enumerate(layers(scene)):
        black, white = np.zeros((SIDE, SIDE, 3), np.float32), np.full((SIDE, SIDE, 3), 255, np.float32)
        draw(black)
        draw(white)
        owner[(white - black)[..., 0] < 128] = place
    return owner
