"""Pictures of every mode and kinds of damage in; points and masks to the grid; drawings and whole files."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from minidrag.images import (
    load_mask,
    load_picture,
    mask_to_grid,
    resize,
    to_grid,
    to_picture,
    to_pixels,
    to_tensor,
    working_size,
    write_whole,
)

WIDTH, HEIGHT = 100, 72


def colors() -> Image.Image:
    """A smooth picture without any symmetry."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([2 * x + 20, 3 * y + 10, 200 - x - y // 2], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def grey() -> Image.Image:
    return colors().convert("L")


def far(picture: Image.Image, other: Image.Image) -> int:
    """The largest difference of two RGB pictures of one size."""
    assert picture.mode == other.mode == "RGB" and picture.size == other.size
    return int(np.abs(np.asarray(picture).astype(int) - np.asarray(other).astype(int)).max())


# Colour pictures.


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("RGB", "png", 0),
        ("RGB", "bmp", 0),
        ("RGB", "tif", 0),
        ("RGB", "jpg", 12),
        ("RGB", "webp", 16),
        ("RGBA", "png", 0),
        ("CMYK", "tif", 1),
        ("CMYK", "jpg", 16),
        ("YCbCr", "tif", 4),
        ("P", "png", 45),
        ("P", "gif", 45),
    ],
)
def test_colour_modes(tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"picture.{suffix}"
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    image = colors().quantize(256) if mode == "P" else colors().convert(mode)
    image.save(path, **options)
    with Image.open(path) as stored:
        assert stored.mode == mode or mode == "YCbCr"
    assert far(load_picture(path), colors()) <= tolerance


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("L", "jpg"), ("LA", "png"), ("P", "png")])
def test_grey_modes(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    grey().convert(mode).save(path)
    assert far(load_picture(path), grey().convert("RGB")) <= (4 if suffix == "jpg" else 0)


def test_black_and_white(tmp_path: Path) -> None:
    grey().convert("1").save(tmp_path / "picture.png")
    assert far(load_picture(tmp_path / "picture.png"), grey().convert("1").convert("RGB")) == 0


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "big endian.tif", "32 bits.tif", "grey.pgm"])
def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path, name: str) -> None:
    levels = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    kinds = {"big endian.tif": ">u2", "32 bits.tif": "<i4"}
    Image.fromarray(levels.astype(kinds.get(name, "<u2"))).save(tmp_path / name)
    got = np.asarray(load_picture(tmp_path / name))
    assert (got[0, 0].tolist(), got[-1, -1].tolist()) == ([0, 0, 0], [255, 255, 255])
    assert np.array_equal(got[..., 0], np.rint(levels.astype(np.uint16) / 257))


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_png_of_every_kind(tmp_path: Path, kind: int, channels: int) -> None:
    """Grey, colour, and both with alpha, written here as Pillow writes 16 bits in grey only."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    levels = np.linspace(0, 65535, HEIGHT * WIDTH * channels).reshape(HEIGHT, WIDTH, channels).astype(">u2")
    if channels in (2, 4):
        levels[..., -1] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, kind, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    got = np.asarray(load_picture(tmp_path / "picture.png")).astype(float)
    want = levels[..., : 3 if channels > 2 else 1] / 257
    assert got.shape == (HEIGHT, WIDTH, 3) and np.abs(got - want).max() <= 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, "png") for mode in ("I;16", "L", "1", "P", "LA", "RGBA")]
    + [(mode, "tif") for mode in ("I;16", "L", "CMYK", "RGBA")],
)
def test_every_mode_is_turned_upright(tmp_path: Path, mode: str, suffix: str) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 30, 20))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    path = tmp_path / f"picture.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (image if mode == "I;16" else image.convert(mode)).save(path, exif=exif)
    got = load_picture(path)
    assert got.size == (HEIGHT, WIDTH)
    dark = np.argwhere(np.asarray(got)[..., 0] < 128)
    assert dark.min(axis=0).tolist() == [0, HEIGHT - 20] and dark.max(axis=0).tolist() == [29, HEIGHT - 1]


def test_transparency_becomes_white(tmp_path: Path) -> None:
    alpha = Image.new("L", (WIDTH, HEIGHT), 255)
    alpha.paste(0, (0, 0, 50, HEIGHT))
    alpha.paste(128, (50, 0, 60, HEIGHT))
    image = colors()
    image.putalpha(alpha)
    image.save(tmp_path / "picture.png")
    got, plain = np.asarray(load_picture(tmp_path / "picture.png")), np.asarray(colors()).astype(int)
    assert (got[:, :50] == 255).all()
    assert np.abs(got[:, 50:60] - (plain[:, 50:60] * 128 + 255 * 127) / 255).max() <= 1
    assert np.array_equal(got[:, 60:], plain[:, 60:])


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entry_becomes_white(tmp_path: Path, suffix: str) -> None:
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 10, 10))
    image.save(tmp_path / f"picture.{suffix}", transparency=0)
    got = load_picture(tmp_path / f"picture.{suffix}")
    assert got.getpixel((5, 5)) == (255, 255, 255) and got.getpixel((50, 50)) == (0, 0, 255)


def test_transparent_colour_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 255))
    image.paste((1, 2, 3), (0, 0, 10, 10))
    image.save(tmp_path / "picture.png", transparency=(1, 2, 3))
    got = load_picture(tmp_path / "picture.png")
    assert got.getpixel((5, 5)) == (255, 255, 255) and got.getpixel((50, 50)) == (0, 0, 255)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as stored:
        assert getattr(stored, "n_frames", 1) == 3
    assert far(load_picture(path), frames[0]) <= 8


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels = np.asarray(colors())  # as stored, by the standard's names for the places of row 0 and column 0
    stored = [
        pixels,  # top, left
        pixels[:, ::-1],  # top, right
        pixels[::-1, ::-1],  # bottom, right
        pixels[::-1],  # bottom, left
        pixels.swapaxes(0, 1),  # left, top
        pixels[:, ::-1].swapaxes(0, 1),  # right, top
        pixels[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        pixels[::-1].swapaxes(0, 1),  # left, bottom
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{suffix}"
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    assert far(load_picture(path), colors()) <= (0 if suffix in ("png", "tif") else 20)


@pytest.mark.parametrize("exif", [b"Exif\0\0not a header", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_no_harm(tmp_path: Path, exif: bytes) -> None:
    colors().save(tmp_path / "picture.jpg", exif=exif, quality=95)
    assert far(load_picture(tmp_path / "picture.jpg"), colors()) <= 12


# What is no picture.


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file .*nowhere.png"):
        load_picture(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="is a folder"):
        load_picture(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, I am text", b"\x89PNG\r\n\x1a\n", bytes(5000)])
def test_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(ValueError, match="picture.png is no picture of a known format"):
        load_picture(tmp_path / "picture.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tif"])
def test_truncated_picture(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=f"picture.{suffix} (cannot be read|is no picture)"):
            load_picture(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_picture_either_loads_or_is_a_value_error(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "picture"
    for suffix in ("png", "jpg", "gif", "tif"):
        colors().save(tmp_path / f"whole.{suffix}")
        whole = np.frombuffer((tmp_path / f"whole.{suffix}").read_bytes(), dtype=np.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[rng.integers(0, len(broken), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(broken.tobytes())
            try:
                load_picture(path)
            except ValueError as error:
                assert str(path) in str(error)


def test_floating_point_picture(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(tmp_path / "picture.tif")
    with pytest.raises(ValueError, match="floating-point values, save it with 8 or 16 bits"):
        load_picture(tmp_path / "picture.tif")


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 9_000), (20_000, 20_000), (200_000, 1_000)])
def test_absurdly_large_picture(
    tmp_path: Path, size: tuple[int, int], recwarn: pytest.WarningsRecorder
) -> None:
    header = b"P4\n%d %d\n" % size  # a bitmap file whose pixels are missing: nothing must try to read them
    (tmp_path / "picture.pbm").write_bytes(header + b"0")
    with pytest.raises(ValueError, match="too large, more than 64,000,000 pixels"):
        load_picture(tmp_path / "picture.pbm")
    assert not recwarn.list  # one sentence and no second one from Pillow


@pytest.mark.parametrize("size", [(63, 500), (500, 63), (1, 1)])
def test_small_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "picture.png")
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels: each side needs 64"):
        load_picture(tmp_path / "picture.png")


def test_smallest_picture(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    assert load_picture(tmp_path / "picture.png").size == (64, 64)


# Masks.


def marked(mode: str) -> Image.Image:
    """A mask whose right part is marked."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    mask.paste(255, (60, 0, WIDTH, HEIGHT))
    if mode == "RGBA":  # white paint on a transparent layer
        layer = Image.new("RGBA", mask.size, (255, 255, 255, 255))
        layer.putalpha(mask)
        return layer
    return mask.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("1", "png"), ("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "gif"), ("L", "jpg")],
)
def test_mask_modes(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"mask.{suffix}"
    marked(mode).save(path)
    mask = load_mask(path, (WIDTH, HEIGHT))
    assert mask is not None and mask.shape == (HEIGHT, WIDTH) and mask.dtype == torch.float32
    assert mask[:, 60:].eq(1).all() and mask[:, :60].eq(0).all()


def test_sixteen_bit_mask(tmp_path: Path) -> None:
    levels = np.asarray(marked("L")).astype(np.uint16) * 257
    Image.fromarray(levels).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))
    assert mask is not None and mask.sum() == 40 * HEIGHT


def test_empty_mask_is_none(tmp_path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT)) is None


def test_grey_in_a_mask_counts_as_the_nearer_end(tmp_path: Path) -> None:
    levels = np.full((HEIGHT, WIDTH), 127, np.uint8)
    levels[:, 60:] = 128
    Image.fromarray(levels).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))
    assert mask is not None and mask[:, 60:].eq(1).all() and mask[:, :60].eq(0).all()


def test_mask_with_ones_for_white(tmp_path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="no white: its lightest grey is 1 of 255"):
        load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))


def test_bad_masks(tmp_path: Path) -> None:
    marked("L").save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="is 100x72 pixels and the picture 72x100"):
        load_mask(tmp_path / "mask.png", (HEIGHT, WIDTH))
    (tmp_path / "mask.png").write_text("no mask")
    with pytest.raises(ValueError, match="mask.png is no picture"):
        load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))
    with pytest.raises(ValueError, match="there is no file"):
        load_mask(tmp_path / "none.png", (WIDTH, HEIGHT))


def test_mask_to_grid_counts_half_covered_cells() -> None:
    mask = torch.zeros(32, 48)
    mask[:, 20:] = 1  # the cell of columns 16 to 23 is covered by half
    mask[0:8, 12:] = 1  # and so is that of columns 8 to 15 in the first row
    mask[8:16, 13:] = 1  # but less of it in the second
    want = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1.0]])
    got = mask_to_grid(mask, (4, 6))
    assert torch.equal(got, want) and got.dtype == mask.dtype


@pytest.mark.parametrize("row", range(8))
def test_thin_line_stays_in_the_grid_wherever_it_is(row: int) -> None:
    mask = torch.zeros(64, 64)
    mask[16 + row, 10:50] = 1
    got = mask_to_grid(mask, (8, 8))
    assert got[2, 2:6].eq(1).all() and got.sum() <= 6 and got[[0, 1, 3, 4, 5, 6, 7]].eq(0).all()


@pytest.mark.parametrize("grid", [(47, 62), (64, 85), (200, 300), (1, 1)])
def test_mask_to_any_grid(grid: tuple[int, int]) -> None:
    assert mask_to_grid(torch.ones(375, 500), grid).eq(1).all()
    assert mask_to_grid(torch.zeros(375, 500), grid).eq(0).all()
    assert mask_to_grid(torch.ones(375, 500), grid).shape == grid


# Sizes, tensors, points.


@pytest.mark.parametrize(
    ("size", "short_side", "multiple", "want"),
    [
        ((512, 512), 512, 8, (512, 512)),
        ((500, 375), 512, 8, (680, 512)),  # 682.67 lies nearer to 680 than to 688
        ((375, 500), 512, 8, (512, 680)),
        ((4000, 3000), 512, 8, (680, 512)),
        ((64, 64), 512, 8, (512, 512)),
        ((512, 341), 512, 8, (768, 512)),
        ((512, 913), 512, 8, (512, 912)),
        ((1000, 64), 512, 64, (8000, 512)),
        ((300, 200), 500, 8, (752, 504)),  # 500 is no multiple of 8
        ((128, 160), 128, 4, (128, 160)),
        ((70, 64), 3, 8, (8, 8)),
    ],
)
def test_working_size(size: tuple[int, int], short_side: int, multiple: int, want: tuple[int, int]) -> None:
    assert working_size(*size, short_side, multiple) == want


@pytest.mark.parametrize(
    ("size", "short_side"), [((4096, 4096), 4096), ((64, 512), 2048), ((64, 64), 100_000)]
)
def test_working_size_has_a_limit(size: tuple[int, int], short_side: int) -> None:
    with pytest.raises(
        ValueError, match="is too large, more than 16,000,000 pixels: choose a smaller --size"
    ):
        working_size(*size, short_side, 8)


def test_picture_to_tensor_and_back_is_exact() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=-1))
    tensor = to_tensor(picture)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1) and tensor[0, 0, 0, 5] == 5 / 127.5 - 1
    assert tensor[0, 1, 5, 0] == 5 / 127.5 - 1  # rows before columns
    assert far(to_picture(tensor), picture) == 0
    assert far(to_picture(tensor.double()), picture) == 0


def test_tensor_to_picture_clamps_and_rounds() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0]).reshape(1, 1, 1, 6).expand(2, 3, 1, 6)
    levels = np.asarray(to_picture(values.requires_grad_()))[0, :, 0].tolist()
    assert levels == [0, 0, 128, 255, 255, 255]


def test_resize_keeps_borders_on_borders() -> None:
    """A linear ramp shows where pixels come from; torch's bilinear resizing has the same convention."""
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 100, axis=0).repeat(3, axis=2)
    picture = Image.fromarray(ramp)
    for size in ((200, 200), (50, 50), (160, 120)):
        got = to_tensor(resize(picture, size))[0, 0]
        want = interpolate(to_tensor(picture), size=size[::-1], mode="bilinear", antialias=True)[0, 0]
        assert (got - want)[:, 4:-4].abs().max() < 1.5 / 127.5
    assert resize(picture, picture.size) is picture


@pytest.mark.parametrize(
    ("size", "grid"),
    [((512, 512), (256, 256)), ((500, 375), (252, 340)), ((64, 80), (300, 200)), ((4000, 3000), (256, 340))],
)
def test_points_go_to_the_grid_and_back(size: tuple[int, int], grid: tuple[int, int]) -> None:
    width, height = size
    points = [(0, 0), (width - 1, height - 1), (0, height - 1), (17, 33), (12.25, 60.5)]
    mapped = to_grid(points, size, grid)
    assert np.allclose(to_pixels(mapped, size, grid), points, atol=1e-9)
    for row, column in mapped[:4]:
        assert 0 <= round(row) < grid[0] and 0 <= round(column) < grid[1]


def test_worked_points() -> None:
    assert to_grid([(120, 200)], (512, 512), (256, 256)) == [(99.75, 59.75)]
    assert to_grid([(0, 0), (511, 511)], (512, 512), (256, 256)) == [(-0.25, -0.25), (255.25, 255.25)]
    assert to_grid([(10, 20)], (100, 50), (50, 100)) == [(20, 10)]  # x is the column
    assert to_pixels([(0, 1)], (512, 512), (256, 256)) == [(2.5, 0.5)]
    assert to_grid([], (512, 512), (256, 256)) == []


def test_points_follow_a_spot_through_resizing() -> None:
    """A bright spot lies, after torch's and Pillow's resizing, where `to_grid` says."""
    y, x = np.mgrid[:150, :200]
    spot = (131.0, 44.0)
    light = 255 * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 50)
    picture = Image.fromarray(light.astype(np.uint8)).convert("RGB")
    for grid in ((75, 100), (210, 320), (60, 50)):
        pillow = to_tensor(resize(picture, (grid[1], grid[0])))[0, 0] + 1
        torchs = interpolate(to_tensor(picture) + 1, size=grid, mode="bilinear", antialias=True)[0, 0]
        [want] = to_grid([spot], picture.size, grid)
        for level in (pillow, torchs):
            weight = level / level.sum()
            row = (weight.sum(1) * torch.arange(grid[0])).sum().item()
            column = (weight.sum(0) * torch.arange(grid[1])).sum().item()
            assert abs(row - want[0]) < 0.05 and abs(column - want[1]) < 0.05


# Files.


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.png"
    write_whole(path, colors().save)
    assert far(load_picture(path), colors()) == 0 and os.listdir(tmp_path) == ["result.png"]
    before, number = path.read_bytes(), path.stat().st_ino
    write_whole(path, colors().save)
    assert path.stat().st_ino != number  # another file took the name; the old one was never open for writing

    def fails(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fails)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["result.png"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "no folder" / "result.png", colors().save)
