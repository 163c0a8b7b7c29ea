"""Tensors, sizes, and the seam of a paste."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import HEIGHT, WIDTH, color_image, max_difference
from torch.nn.functional import interpolate

from minidrag.images import paste, resize, to_image, to_tensor, working_size


def gray_image() -> Image.Image:
    return color_image().convert("L")


@pytest.mark.parametrize(
    ("size", "short_side", "multiple", "expected"),
    [
        ((512, 512), 512, 8, (512, 512)),
        ((500, 375), 512, 8, (680, 512)),  # 682.67 is closer to 680 than to 688
        ((375, 500), 512, 8, (512, 680)),
        ((4000, 3000), 512, 8, (680, 512)),
        ((64, 64), 512, 8, (512, 512)),
        ((512, 341), 512, 8, (768, 512)),
        ((512, 913), 512, 8, (512, 912)),
        ((1000, 64), 512, 64, (8000, 512)),
        ((300, 200), 500, 8, (752, 504)),  # 500 is not a multiple of 8
        ((128, 160), 128, 4, (128, 160)),
        ((70, 64), 3, 8, (8, 8)),
    ],
)
def test_working_size(
    size: tuple[int, int], short_side: int, multiple: int, expected: tuple[int, int]
) -> None:
    assert working_size(*size, short_side, multiple) == expected


@pytest.mark.parametrize(
    ("size", "short_side", "found"),
    [
        ((4096, 4096), 4096, "4096x4096"),
        ((64, 512), 2048, "2048x16384"),
        ((64, 64), 100_000, "100000x100000"),
    ],
)
def test_working_size_has_a_limit(size: tuple[int, int], short_side: int, found: str) -> None:
    message = f"the working size {found} has more than 16,000,000 pixels: choose a smaller --size"
    with pytest.raises(ValueError, match=message):
        working_size(*size, short_side, 8)


def test_image_to_tensor_and_back_is_exact() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=-1))
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1) and tensor[0, 0, 0, 5] == 5 / 127.5 - 1
    assert tensor[0, 1, 5, 0] == 5 / 127.5 - 1  # rows before columns
    assert max_difference(to_image(tensor), image) == 0
    assert max_difference(to_image(tensor.double()), image) == 0


def test_tensor_to_image_clamps_and_rounds() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0]).reshape(1, 1, 1, 6).expand(2, 3, 1, 6)
    levels = np.asarray(to_image(values.requires_grad_()))[0, :, 0].tolist()
    assert levels == [0, 0, 128, 255, 255, 255]


def test_resize_maps_borders_to_borders() -> None:
    """Compare a linear ramp with torch's bilinear resizing, which has the same convention."""
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 100, axis=0).repeat(3, axis=2)
    image = Image.fromarray(ramp)
    for size in ((200, 200), (50, 50), (160, 120)):
        resized = to_tensor(resize(image, size))[0, 0]
        expected = interpolate(to_tensor(image), size=size[::-1], mode="bilinear", antialias=True)[0, 0]
        assert (resized - expected)[:, 4:-4].abs().max() < 1.5 / 127.5
    assert resize(image, image.size) is image


def test_paste_keeps_every_pixel_outside_the_mask() -> None:
    original = color_image()
    edited = Image.fromarray(255 - np.asarray(original))
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[10:60, 20:80] = True
    mask[40, 40] = False  # which the blur would fill
    pasted = np.asarray(paste(edited, original, mask, 1))
    outside = (~mask).numpy()
    assert np.array_equal(pasted[outside], np.asarray(original)[outside])
    assert np.array_equal(pasted[14:36, 24:76], np.asarray(edited)[14:36, 24:76])


def test_the_seam_of_a_paste_is_soft_on_the_inside() -> None:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[:, 20:] = True
    black, white = Image.new("RGB", (WIDTH, HEIGHT)), Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    opacity = np.asarray(paste(white, black, mask, 1))[36, :, 0] / 255
    assert (opacity[:20] == 0).all() and (opacity[24:] == 1).all()
    assert 0.25 < opacity[20] < 0.5 < opacity[21] < 1, "a Gaussian of 1 pixel, stretched to 0 at the edge"
