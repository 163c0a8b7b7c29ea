"""Reading images and masks of every mode and profile, and damaged files."""

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms
from support import profiles
from support.images import HEIGHT, WIDTH, color_image, max_difference

from minidrag.system.pictures import load_image, load_mask


def gray_image() -> Image.Image:
    return color_image().convert("L")


# Images


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
def test_color_modes(tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"image.{suffix}"
    options: dict[str, Any] = {"quality": 95} if suffix in ("jpg", "webp") else {}
    image = color_image().quantize(256) if mode == "P" else color_image().convert(mode)
    image.save(path, **options)
    with Image.open(path) as stored:
        assert stored.mode == mode or mode == "YCbCr"
    assert max_difference(load_image(path), color_image()) <= tolerance


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("L", "jpg"), ("LA", "png"), ("P", "png")])
def test_gray_modes(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    gray_image().convert(mode).save(path)
    expected = gray_image().convert("RGB")
    assert max_difference(load_image(path), expected) <= (4 if suffix == "jpg" else 0)


def test_black_and_white(tmp_path: Path) -> None:
    gray_image().convert("1").save(tmp_path / "image.png")
    assert max_difference(load_image(tmp_path / "image.png"), gray_image().convert("1").convert("RGB")) == 0


@pytest.mark.parametrize("name", ["gray.png", "gray.tif", "big endian.tif", "32 bits.tif", "gray.pgm"])
def test_16_bit_images_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    levels = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    dtypes = {"big endian.tif": ">u2", "32 bits.tif": "<i4"}
    Image.fromarray(levels.astype(dtypes.get(name, "<u2"))).save(tmp_path / name)
    pixels = np.asarray(load_image(tmp_path / name))
    assert (pixels[0, 0].tolist(), pixels[-1, -1].tolist()) == ([0, 0, 0], [255, 255, 255])
    assert np.array_equal(pixels[..., 0], np.rint(levels.astype(np.uint16) / 257))


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_of_every_color_type(tmp_path: Path, color_type: int, channels: int) -> None:
    """Gray, color, and both with alpha; written by hand because Pillow writes 16-bit gray only."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    levels = np.linspace(0, 65535, HEIGHT * WIDTH * channels).reshape(HEIGHT, WIDTH, channels).astype(">u2")
    if channels in (2, 4):
        levels[..., -1] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, color_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    pixels = np.asarray(load_image(tmp_path / "image.png")).astype(float)
    expected = levels[..., : 3 if channels > 2 else 1] / 257
    assert pixels.shape == (HEIGHT, WIDTH, 3) and np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, "png") for mode in ("I;16", "L", "1", "P", "LA", "RGBA")]
    + [(mode, "tif") for mode in ("I;16", "L", "CMYK", "RGBA")],
)
def test_every_mode_is_rotated_upright(tmp_path: Path, mode: str, suffix: str) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 30, 20))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise to display
    (image if mode == "I;16" else image.convert(mode)).save(path, exif=exif)
    loaded = load_image(path)
    assert loaded.size == (HEIGHT, WIDTH)
    dark = np.argwhere(np.asarray(loaded)[..., 0] < 128)
    assert dark.min(axis=0).tolist() == [0, HEIGHT - 20] and dark.max(axis=0).tolist() == [29, HEIGHT - 1]


def test_transparency_becomes_white(tmp_path: Path) -> None:
    alpha = Image.new("L", (WIDTH, HEIGHT), 255)
    alpha.paste(0, (0, 0, 50, HEIGHT))
    alpha.paste(128, (50, 0, 60, HEIGHT))
    image = color_image()
    image.putalpha(alpha)
    image.save(tmp_path / "image.png")
    loaded, opaque = np.asarray(load_image(tmp_path / "image.png")), np.asarray(color_image()).astype(int)
    assert (loaded[:, :50] == 255).all()
    assert np.abs(loaded[:, 50:60] - (opaque[:, 50:60] * 128 + 255 * 127) / 255).max() <= 1
    assert np.array_equal(loaded[:, 60:], opaque[:, 60:])


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entry_becomes_white(tmp_path: Path, suffix: str) -> None:
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 10, 10))
    image.save(tmp_path / f"image.{suffix}", transparency=0)
    loaded = load_image(tmp_path / f"image.{suffix}")
    assert loaded.getpixel((5, 5)) == (255, 255, 255) and loaded.getpixel((50, 50)) == (0, 0, 255)


def test_transparent_color_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 255))
    image.paste((1, 2, 3), (0, 0, 10, 10))
    image.save(tmp_path / "image.png", transparency=(1, 2, 3))
    loaded = load_image(tmp_path / "image.png")
    assert loaded.getpixel((5, 5)) == (255, 255, 255) and loaded.getpixel((50, 50)) == (0, 0, 255)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as stored:
        assert getattr(stored, "n_frames", 1) == 3
    assert max_difference(load_image(path), frames[0]) <= 8


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels = np.asarray(color_image())  # below, as stored: the standard's names for row 0 and column 0
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
    path = tmp_path / f"image.{suffix}"
    options: dict[str, Any] = {"quality": 95} if suffix in ("jpg", "webp") else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    assert max_difference(load_image(path), color_image()) <= (0 if suffix in ("png", "tif") else 20)


@pytest.mark.parametrize("exif", [b"Exif\0\0not a header", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_corrupt_exif_is_ignored(tmp_path: Path, exif: bytes) -> None:
    color_image().save(tmp_path / "image.jpg", exif=exif, quality=95)
    assert max_difference(load_image(tmp_path / "image.jpg"), color_image()) <= 12


# Color profiles

P3 = {"icc_profile": profiles.rgb(profiles.DISPLAY_P3, 2.2)}
ADOBE = {"icc_profile": profiles.rgb(profiles.ADOBE_RGB, 563 / 256)}
GRAY = {"icc_profile": profiles.gray(1.0)}


def off(image: Image.Image, expected: np.ndarray) -> float:
    """Largest distance of an image from levels of 255."""
    return float(np.abs(np.asarray(image).astype(float) - expected).max())


@pytest.mark.parametrize(
    ("profile", "matrix", "exponent"), [(P3, "DISPLAY_P3", 2.2), (ADOBE, "ADOBE_RGB", 563 / 256)]
)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_colors_of_another_profile_become_those_of_srgb(
    tmp_path: Path, suffix: str, profile: dict[str, Any], matrix: str, exponent: float
) -> None:
    path = tmp_path / f"image.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    color_image().save(path, **(profile | options))
    pixels = np.asarray(Image.open(path).convert("RGB"))
    expected = profiles.in_srgb(pixels, getattr(profiles, matrix), exponent)
    loaded = load_image(path)
    assert off(loaded, expected) <= 1.5
    assert np.abs(expected - pixels).max() > 20, "it would show if the profile were ignored"
    assert loaded.info == {}, "a profile that is left would be written into the results"


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "I;16", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_profiles_of_every_mode(tmp_path: Path, mode: str, orientation: int) -> None:
    path, exif = tmp_path / "image.tif", Image.Exif()
    exif[0x0112] = orientation
    source, expected = color_image(), None
    if mode == "CMYK":
        image, profile = Image.new("CMYK", (WIDTH, HEIGHT), (200, 20, 60, 30)), profiles.cmyk()
    elif mode in ("P", "RGBA"):
        image, profile = (source.quantize(256) if mode == "P" else source.convert(mode)), P3["icc_profile"]
        expected = profiles.in_srgb(np.asarray(image.convert("RGB")), profiles.DISPLAY_P3, 2.2)
    else:
        image, profile = source.convert("L"), profiles.gray(1.0)
        expected = np.stack([profiles.encoded(np.asarray(image) / 255)] * 3, axis=-1)
        image = image.convert(mode) if mode == "LA" else image
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image.save(path, exif=exif, icc_profile=profile)
    loaded = load_image(path)
    if expected is None:  # Lab of the table, by hand, within what tables of 8 bits can hold
        plain = image.convert("RGB").getpixel((0, 0))
        again = ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            "RGB",
        )
        assert again is not None and plain != again.getpixel((0, 0))
        found, wanted = (np.array(shown.getpixel((0, 0)), float) for shown in (loaded, again))
        assert np.abs(found - wanted).max() <= 12, "but for the black point"
        return
    upright = expected if orientation == 1 else np.rot90(expected, -1)
    assert off(loaded, upright) <= 1.5


def test_transparency_survives_a_profile(tmp_path: Path) -> None:
    alpha = Image.new("L", (WIDTH, HEIGHT), 255)
    alpha.paste(0, (0, 0, 50, HEIGHT))
    image = color_image()
    image.putalpha(alpha)
    image.save(tmp_path / "image.png", icc_profile=P3["icc_profile"])
    loaded, expected = (
        load_image(tmp_path / "image.png"),
        profiles.in_srgb(np.asarray(color_image()), profiles.DISPLAY_P3, 2.2),
    )
    expected[:, :50] = 255
    assert off(loaded, expected) <= 1.5 and loaded.info == {"transparent": True}


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"not a profile",
        P3["icc_profile"][:300],
        P3["icc_profile"][:128] + bytes(400),
        profiles.gray(1.0),  # of another kind of image
        profiles.cmyk(),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored(tmp_path: Path, profile: bytes) -> None:
    color_image().save(tmp_path / "image.png", icc_profile=profile)
    assert max_difference(load_image(tmp_path / "image.png"), color_image()) == 0


def test_a_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    color_image().save(tmp_path / "image.png", icc_profile=profile)
    loaded = load_image(tmp_path / "image.png")
    assert max_difference(loaded, color_image()) == 0 and loaded.info == {}


def test_a_large_profile_is_used(tmp_path: Path) -> None:
    padding = np.random.default_rng(0).bytes(2_000_000)  # after the end that its header tells
    color_image().save(tmp_path / "image.png", icc_profile=P3["icc_profile"] + padding)
    expected = profiles.in_srgb(np.asarray(color_image()), profiles.DISPLAY_P3, 2.2)
    assert off(load_image(tmp_path / "image.png"), expected) <= 1.5


# Files that are not usable images


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.eps"])
def test_no_decoder_starts_a_program(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads the format from the content and hands EPS to Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 72\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / name).write_text(text)
    for load in (load_image, lambda path: load_mask(path, (100, 72))):
        with pytest.raises(ValueError, match="is not an image in a known format: save it as PNG or JPEG"):
            load(tmp_path / name)
    with Image.open(tmp_path / name) as image, pytest.raises(OSError):
        image.load()
    assert (tmp_path / "ran").exists(), "nothing would have been started, and the test shows nothing"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", Path("/dev/zero"), Path("/dev/stdin")):
        with pytest.raises(ValueError, match="is (not a regular file: give a file|not an image in a known)"):
            load_image(name)


def test_what_decoders_print_is_kept_to_themselves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    color_image().save(tmp_path / "image.tif", compression="tiff_lzw")
    whole = bytearray((tmp_path / "image.tif").read_bytes())
    for start in range(20, 2000, 40):
        damaged = whole[:start] + bytes([255] * 30) + whole[start + 30 :]
        (tmp_path / "damaged.tif").write_bytes(damaged)
        with suppress(ValueError):
            load_image(tmp_path / "damaged.tif")
    assert capfd.readouterr().err == ""


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file .*nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, I am text", b"\x89PNG\r\n\x1a\n", bytes(5000)])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.png").write_bytes(content)
    message = "image.png is not an image in a known format: save it as PNG or JPEG"
    with pytest.raises(ValueError, match=message):
        load_image(tmp_path / "image.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tif"])
def test_truncated_image(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    for fraction in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * fraction)])
        with pytest.raises(ValueError, match=f"image.{suffix} (cannot be read: |is not an image)"):
            load_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_image_loads_or_raises_value_error(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "image"
    for suffix in ("png", "jpg", "gif", "tif"):
        color_image().save(tmp_path / f"intact.{suffix}")
        intact = np.frombuffer((tmp_path / f"intact.{suffix}").read_bytes(), dtype=np.uint8)
        for _ in range(60):
            damaged = intact.copy()
            damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
            try:
                load_image(path)
            except ValueError as error:
                assert str(path) in str(error)


def test_floating_point_image(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match="it has floating-point values: save it with 8 or 16 bits"):
        load_image(tmp_path / "image.tif")


def test_whole_numbers_of_more_than_16_bits(tmp_path: Path) -> None:
    levels = np.linspace(0, 2**31 - 1, HEIGHT * WIDTH).astype(np.int32).reshape(HEIGHT, WIDTH)
    for values in (levels, -levels):
        Image.fromarray(values).save(tmp_path / "image.tif")
        with pytest.raises(ValueError, match="it has values of more than 16 bits: save it with 8 or 16"):
            load_image(tmp_path / "image.tif")


def test_a_mask_of_labels_in_16_bits_is_not_empty(tmp_path: Path) -> None:
    labels = np.zeros((HEIGHT, WIDTH), np.uint16)
    labels[:5] = 1
    Image.fromarray(labels).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="has no white: its lightest gray is 1 of 255"):
        load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 9_000), (20_000, 20_000), (200_000, 1_000)])
def test_oversized_image(tmp_path: Path, size: tuple[int, int], recwarn: pytest.WarningsRecorder) -> None:
    header = b"P4\n%d %d\n" % size  # a bitmap without its pixels: nothing may try to read them
    (tmp_path / "image.pbm").write_bytes(header + b"0")
    with pytest.raises(ValueError, match="too large, more than 64,000,000 pixels"):
        load_image(tmp_path / "image.pbm")
    assert not recwarn.list  # no warning of Pillow's beside the error


@pytest.mark.parametrize("size", [(63, 500), (500, 63), (1, 1)])
def test_undersized_image(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match=f"is {size[0]}x{size[1]} pixels: each side must be at least 64"):
        load_image(tmp_path / "image.png")


def test_smallest_image(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png").size == (64, 64)


# Masks


def mask_image(mode: str) -> Image.Image:
    """A mask with its right part marked."""
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
    mask_image(mode).save(path)
    mask = load_mask(path, (WIDTH, HEIGHT))
    assert mask is not None and mask.shape == (HEIGHT, WIDTH) and mask.dtype == torch.bool
    assert mask[:, 60:].eq(1).all() and mask[:, :60].eq(0).all()


@pytest.mark.parametrize("color", [(0, 0, 0), (226, 32, 44), (90, 90, 90), (250, 240, 10)])
@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_paint_of_one_color_on_a_transparent_layer(
    tmp_path: Path, color: tuple[int, int, int], suffix: str
) -> None:
    layer = Image.new("RGBA", (WIDTH, HEIGHT), (*color, 255))
    layer.putalpha(mask_image("L"))
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    layer.save(tmp_path / f"mask.{suffix}", **options)
    mask = load_mask(tmp_path / f"mask.{suffix}", (WIDTH, HEIGHT))
    assert mask is not None and mask[:, 60:].eq(1).all() and mask[:, :60].eq(0).all()


def test_gray_paint_and_transparency(tmp_path: Path) -> None:
    layer = Image.merge("LA", [Image.new("L", (WIDTH, HEIGHT)), mask_image("L")])
    layer.save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))
    assert mask is not None and mask.sum() == 40 * HEIGHT


def test_where_colors_say_something_they_are_the_mask(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (0, 0, 50, HEIGHT))
    layer.paste((255, 255, 255, 255), (60, 0, WIDTH, HEIGHT))
    layer.save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))
    assert mask is not None and mask[:, 60:].eq(1).all() and mask[:, :60].eq(0).all()
    for alpha in (0, 255):  # alpha says nothing either
        Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, alpha)).save(tmp_path / "mask.png")
        assert load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT)) is None


def test_16_bit_mask(tmp_path: Path) -> None:
    levels = np.asarray(mask_image("L")).astype(np.uint16) * 257
    Image.fromarray(levels).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))
    assert mask is not None and mask.sum() == 40 * HEIGHT


def test_empty_mask_is_none(tmp_path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT)) is None


def test_gray_in_a_mask_counts_as_the_nearer_of_black_and_white(tmp_path: Path) -> None:
    levels = np.full((HEIGHT, WIDTH), 127, np.uint8)
    levels[:, 60:] = 128
    Image.fromarray(levels).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))
    assert mask is not None and mask[:, 60:].eq(1).all() and mask[:, :60].eq(0).all()


def test_mask_of_zeros_and_ones_is_refused(tmp_path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="mask.png has no white: its lightest gray is 1 of 255"):
        load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))


def test_unusable_masks(tmp_path: Path) -> None:
    mask_image("L").save(tmp_path / "mask.png")
    message = "mask.png is 100x72 pixels, the image 72x100: make them the same size"
    with pytest.raises(ValueError, match=message):
        load_mask(tmp_path / "mask.png", (HEIGHT, WIDTH))
    (tmp_path / "mask.png").write_text("not a mask")
    with pytest.raises(ValueError, match="mask.png is not an image"):
        load_mask(tmp_path / "mask.png", (WIDTH, HEIGHT))
    with pytest.raises(ValueError, match="there is no file"):
        load_mask(tmp_path / "none.png", (WIDTH, HEIGHT))
