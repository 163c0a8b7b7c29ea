"""The original's detail in an edit that was made at the working size."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidrag.config import EditConfig
from minidrag.detail import carry_detail, explain
from minidrag.edit import drag_edit
from minidrag.images import psnr, resize, to_tensor
from minidrag.points import Pixel
from minidrag.system import pictures
from minidrag.tiny import DEMO
from minidrag.weights.load import load_model

SIZE, WORKING = (512, 384), (128, 96)


def texture(size: tuple[int, int], seed: int) -> np.ndarray:
    """Noise of every scale: (height, width, 3), 0 to 255."""
    rng = np.random.default_rng(seed)
    width, height = size
    layers = [
        Image.fromarray(rng.uniform(0, 255, (height // 2**k + 1, width // 2**k + 1)).astype(np.float32))
        for k in range(6)
    ]
    gray = np.mean([np.asarray(layer.resize(size, Image.Resampling.BICUBIC)) for layer in layers], axis=0)
    return np.stack([gray * share for share in (1.0, 0.8, 0.6)], axis=-1)


def scene(right: float = 0, down: float = 0) -> Image.Image:
    """A textured square on textured ground, moved by whole pixels."""
    image = texture(SIZE, 0)
    left, top = round(96 + right), round(120 + down)
    image[top : top + 120, left : left + 120] = 255 - texture((120, 120), 1)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def carried(truth: Image.Image, *, move: tuple[float, float], size: tuple[int, int] = WORKING) -> Image.Image:
    edit, reconstruction = (resize(image, size) for image in (truth, scene()))
    return carry_detail(
        scene(), reconstruction, edit, [Pixel(150, 180)], [Pixel(150 + move[0], 180 + move[1])]
    )


def test_an_edit_without_change_is_the_original() -> None:
    for move in ((0, 0), (150, 20)):
        assert carried(scene(), move=move).tobytes() == scene().tobytes()


@pytest.mark.parametrize("move", [(160, 60), (161, 37), (-90, 50)])
def test_a_moved_square_keeps_its_texture(move: tuple[int, int]) -> None:
    truth = scene(*move)
    region = np.zeros(SIZE[::-1], dtype=bool)
    left, top = 96 + move[0], 120 + move[1]
    region[top + 8 : top + 112, left + 8 : left + 112] = True
    found = carried(truth, move=move)
    enlarged = resize(resize(truth, WORKING), SIZE)
    assert psnr(found, truth, region) >= psnr(enlarged, truth, region) + 2
    assert psnr(found, truth) >= psnr(enlarged, truth) + 2


def test_what_nothing_explains_is_the_enlarged_edit() -> None:
    edit = Image.fromarray(texture(WORKING, 7).astype(np.uint8))
    flat = Image.new("RGB", WORKING, (255, 0, 255))
    original = Image.new("RGB", SIZE, (255, 0, 255))
    found = carry_detail(original, flat, edit, [Pixel(10, 10)], [Pixel(100, 10)])
    assert found.tobytes() == resize(edit, SIZE).tobytes()


def test_no_pixels_come_from_beyond_the_border() -> None:
    """A move by 40 pixels brings in 40 columns that no one knows; the border's would make streaks."""
    original = to_tensor(Image.fromarray(texture(WORKING, 4).astype(np.uint8)))[0]
    edit = torch.cat([original[:, :, :1].expand(-1, -1, 40), original[:, :, :-40]], dim=2)
    (_, moved), (_, still) = explain(edit, original, torch.tensor([[50.0, 20]]), torch.tensor([[50.0, 60]]))
    assert moved[:, :40].eq(0).all() and moved[:, 42:].mean() > 0.99
    assert still.mean() < 0.02


@pytest.mark.parametrize("off", [(0.0, 0.0), (0.625, -0.75), (-0.875, 0.25)])
def test_what_nearly_arrived_is_put_on_its_target(off: tuple[float, float]) -> None:
    wide = Image.fromarray(texture((1024, 768), 3).astype(np.uint8))
    affine = (1, 0, -8 * (9.5 + off[1]), 0, 1, -8 * (off[0] - 5))
    moved = wide.transform(wide.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    edit, original = (to_tensor(resize(image, WORKING))[0] for image in (moved, wide))
    drag = torch.tensor([[48.0, 60]]), torch.tensor([[43, 69.5]])
    (move, weight), (_, still) = explain(edit, original, *drag)
    assert move.tolist() == [-5, 9.5]
    assert weight[8:-8, 16:-16].mean() > 0.9 and still[8:-8, 16:-16].mean() < 0.1


def test_what_an_object_has_left_is_not_still() -> None:
    """A faint shadow is within the tolerance of the ground without it, and yet it must not come back."""
    ground = torch.zeros(3, 96, 128)
    original, edit = ground.clone(), ground.clone()
    original[:, 50:60, 20:40] = -0.07  # 9 levels of 255, under the object
    original[:, 20:50, 20:40] = edit[:, 20:50, 80:100] = 0.8
    edit[:, 50:60, 80:100] = -0.07
    (_, moved), (_, still) = explain(edit, original, torch.tensor([[35.0, 30]]), torch.tensor([[35.0, 90]]))
    assert moved[20:60, 80:100].min() > 0.9
    assert still[20:60, 20:40].eq(0).all() and still[:, 46:74].eq(1).all()


def test_what_looks_like_the_object_elsewhere_has_not_moved() -> None:
    """Content that fits a drag by chance, far from its target, remains as the edit has it."""
    original = torch.zeros(3, 96, 128)
    original[:, 20:40, 20:40] = 0.8
    original[:, 60:80, 20:40] = -0.8
    edit = original.flip(2)
    edit[:, 60:80, 88:108] = -0.8
    (_, moved), _ = explain(edit, original, torch.tensor([[30.0, 29.5]]), torch.tensor([[30.0, 97.5]]))
    assert moved[20:40, 88:108].min() > 0.9 and moved[50:].eq(0).all()


def test_the_paper_has_no_detail() -> None:
    assert not EditConfig.paper().detail and not EditConfig.official().detail


def test_a_drag_of_length_zero_changes_nothing() -> None:
    image = pictures.read(DEMO / "ball.png")
    config = EditConfig(lora_steps=0, steps=10, drag_levels=3)
    edit = drag_edit(load_model("tiny", device="cpu"), image, [(43, 90)], [(43, 90)], config=config)
    assert edit.raw.tobytes() != image.tobytes()
    assert np.abs(np.asarray(edit.image).astype(int) - np.asarray(image)).max() <= 2
