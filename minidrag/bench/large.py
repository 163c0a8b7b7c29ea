"""Scenes in large images: in the middle of a sheet of nine, or with texture finer than the model sees."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image

from minidrag.bench.cases import SceneCase
from minidrag.images import resize
from minidrag.tiny.objects import Array
from minidrag.tiny.renderer import SIDE, Part, Scene, layers, render, sky
from minidrag.tiny.scenes import random_scene
from minidrag.window import Window

TEXTURED = 1024  # pixels: side of a textured scene
CONTRAST = 0.1  # of a color: standard deviation of the texture
GRAINS = (2, 4, 8)  # pixels at TEXTURED; eight of them are one of the model's


def in_sheet(case: SceneCase) -> SceneCase:
    """Put a scene in the middle of a sheet of nine scenes, and its truth in the middle of the same sheet."""
    draw = random.Random(f"sheet {case.prompt}")
    tile = Window(SIDE, SIDE, SIDE, SIDE)
    sheet = Image.new("RGB", (3 * SIDE, 3 * SIDE))
    for number in range(9):
        sheet.paste(render(random_scene(draw)), (number % 3 * SIDE, number // 3 * SIDE))
    return replace(
        case,
        before=tile.insert(case.before, sheet),
        truth=tile.insert(case.truth, sheet),
        mask=np.pad(case.mask, SIDE),
        handles=tile.leave(case.handles),
        targets=tile.leave(case.targets),
        tile=tile,
    )


def textured(case: SceneCase) -> SceneCase:
    """Render a scene and its truth at TEXTURED, with a texture on each part that moves along with it."""
    scale = TEXTURED / SIDE
    mask = np.asarray(resize(Image.fromarray(case.mask).convert("RGB"), (TEXTURED, TEXTURED)))[..., 0] >= 128
    handles, targets = (
        [type(point)((point.x + 0.5) * scale - 0.5, (point.y + 0.5) * scale - 0.5) for point in points]
        for points in (case.handles, case.targets)
    )
    before, truth = (render_texture(scene) for scene in (case.scene, case.drag.after))
    tile = Window(0, 0, TEXTURED, TEXTURED)
    return replace(case, before=before, truth=truth, mask=mask, handles=handles, targets=targets, tile=tile)


def render_texture(scene: Scene) -> Image.Image:
    """Render a scene at TEXTURED, each part's color times 1 plus the texture around its anchor."""
    canvas = sky(scene, TEXTURED) * (1 + texture()[..., None])
    for part, draw in layers(scene):
        drawn = canvas.copy()
        draw(drawn)
        black, white = np.zeros_like(canvas), np.full_like(canvas, 255)
        draw(black)
        draw(white)
        behind = (white - black) / 255 * canvas
        x, y = (round(TEXTURED * at) for at in anchor(scene, part))
        canvas = behind + (drawn - behind) * (1 + np.roll(texture(), (y, x), (0, 1))[..., None])
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))


def anchor(scene: Scene, part: Part) -> tuple[float, float]:
    """Point of a part, (x, y) in fractions of the image's side, that moves along with it."""
    kind, index = part
    if kind == "light":
        return scene.light_x, scene.light_y
    if kind == "peak":
        x, height = scene.peaks[index]
        return x, scene.horizon - height
    if kind == "object":
        return scene.objects[index].x, scene.objects[index].y
    return 0, 0


@cache
def texture() -> Array:
    """Noise of several grains, (TEXTURED, TEXTURED), float32, that wraps around."""
    noise = np.zeros((TEXTURED, TEXTURED), np.float32)
    draw = np.random.default_rng(0)
    for grain in GRAINS:
        coarse = draw.normal(size=(TEXTURED // grain, TEXTURED // grain)).astype(np.float32)
        noise += np.kron(coarse, np.ones((grain, grain), np.float32))
    return noise * np.float32(CONTRAST / noise.std())


LARGE: dict[str, Callable[[SceneCase], SceneCase]] = {"sheet": in_sheet, "texture": textured}
