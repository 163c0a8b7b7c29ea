"""Visualization of the UNet's features: components, colors, layout and errors."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minidrag.app import draw
from minidrag.bench import features
from minidrag.bench.__main__ import main
from minidrag.config import EditConfig
from minidrag.method.ddim import Denoiser, invert
from minidrag.method.progress import Progress
from minidrag.model import Model, encode
from minidrag.weights.load import load_model


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("tiny", device="cpu")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setattr(features, "load_model", lambda source: model)


def random_frames(*sizes: tuple[int, int], channels: int = 24) -> list[Tensor]:
    """Features with a mean and correlated channels, like those of a UNet."""
    draw = torch.Generator().manual_seed(7)
    mix = torch.randn(channels, channels, generator=draw, dtype=torch.float64)
    frames = [torch.randn(channels, *size, generator=draw, dtype=torch.float64) for size in sizes]
    return [torch.einsum("dc,chw->dhw", mix, frame) + 3 for frame in frames]


def save_image(path: Path, size: tuple[int, int], seed: int = 0) -> str:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)


# Components and colors


def test_components_match_numpy() -> None:
    frames = random_frames((5, 7), (6, 4))
    rows = np.concatenate([frame.numpy().reshape(24, -1).T for frame in frames])
    centered = rows - rows.mean(axis=0)
    values = features.components(frames).numpy()
    for value, axis in zip(values, np.linalg.svd(centered, full_matrices=False)[2][:3], strict=True):
        expected = centered @ (axis * np.sign(axis[np.abs(axis).argmax()]))
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-9)
    variances = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1][:3]
    np.testing.assert_allclose(values.var(axis=1, ddof=1), variances, rtol=1e-9)


def test_signs_do_not_depend_on_the_order_of_positions() -> None:
    one, other = random_frames((5, 7), (6, 4))
    values = features.components([one, other])
    reordered = features.components([other, one])
    expected = torch.cat([values[:, one[0].numel() :], values[:, : one[0].numel()]], dim=1)
    torch.testing.assert_close(reordered, expected, rtol=0, atol=1e-9)


def test_colors_are_projections_scaled_to_their_joint_range() -> None:
    frames = random_frames((6, 9), (8, 5))
    joint = features.components(frames).numpy()
    parts = [joint[:, :54].reshape(3, 6, 9), joint[:, 54:].reshape(3, 8, 5)]
    low, high = np.quantile(joint, [0.01, 0.99], axis=1)
    for part, image in zip(parts, features.to_colors(frames), strict=True):
        levels = (part - low[:, None, None]) / (high - low)[:, None, None] * 255
        expected = levels.clip(0, 255).transpose(1, 2, 0)
        assert np.asarray(image).shape == expected.shape
        assert np.abs(np.asarray(image) - expected).max() <= 0.501


def test_equal_features_have_equal_colors_and_others_do_not() -> None:
    one, other = random_frames((6, 6), (6, 6))
    same = features.to_colors([one, one])
    assert same[0].tobytes() == same[1].tobytes()
    other[:, :3] = one[:, :3]
    first, second = (np.asarray(image) for image in features.to_colors([one, other]))
    assert (first[:3] == second[:3]).all()
    assert (first[3:] != second[3:]).any(axis=-1).all()


def test_constant_features_have_one_color() -> None:
    flat = torch.ones(8, 4, 4, dtype=torch.float64)
    assert len(set(np.asarray(features.to_colors([flat, flat])[0]).reshape(-1, 3).max(axis=1))) == 1


# Features of an image


def test_features_are_taken_at_the_timestep_of_their_step(model: Model) -> None:
    frame, _ = features.scene_frames("light", 3)[0]
    text, config = model.encode_text("a sun"), EditConfig.official()
    found = features.inverted_features(model, frame.image, text, [3, 1], Progress(show=False))
    clean, _ = encode(model, frame.image, config)
    inversion = invert(Denoiser(model.unet, model.schedule, text, config.steps), clean, 3)
    path = [clean, *inversion]
    assert list(found) == [3, 1]
    for step, time in ((1, 1), (3, 41)):
        with torch.no_grad():
            expected = model.unet(path[step], time, text).features
        assert all(
            torch.equal(one, other[0].double()) for one, other in zip(found[step], expected, strict=True)
        )


def test_labels_have_block_and_timestep(model: Model) -> None:
    """Step 35 of 50 is t = 681, as in the paper."""
    labels = [features.label_of(model, step, 3) for step in (10, 20, 35, 50)]
    assert labels == [f"block 3, t = {time}" for time in ("181", "381", "681\nused by the drag", "981")]


def test_scene_frames_are_before_and_after_a_drag() -> None:
    (before, after), prompt = features.scene_frames("light", 3)
    assert before.label == "before" and after.label == "after" and "," in prompt
    changed = np.asarray(before.image) != np.asarray(after.image)
    assert 0 < changed.any(axis=-1).mean() < 0.5
    for frame in (before, after):
        shown = np.asarray(frame.drawn)
        for color in (draw.RED, draw.BLUE):
            assert (shown == color).all(axis=-1).sum() > 20


# The command


def test_the_page_shows_each_pair_in_its_row_and_column(model: Model) -> None:
    frames, prompt = features.scene_frames("object", 18)
    page = np.asarray(features.features_page(model, frames, prompt, [2, 1]))
    text = model.encode_text(prompt)
    maps = [
        features.inverted_features(model, frame.image, text, [2, 1], Progress(show=False)) for frame in frames
    ]
    cell = features.SIDE
    corners = {}
    for step in (2, 1):
        for block in features.BLOCKS:
            for side, image in enumerate(features.to_colors([frame[step][block - 1] for frame in maps])):
                expected = np.asarray(image.resize((cell, cell), Image.Resampling.NEAREST))
                (corners[step, block, side],) = [
                    (row, column)
                    for row, column in np.argwhere((page == expected[0, 0]).all(axis=-1)).tolist()
                    if np.array_equal(page[row : row + cell, column : column + cell], expected)
                ]
    for step in (2, 1):
        rows, columns = zip(
            *(corners[step, b, side] for b in features.BLOCKS for side in (0, 1)), strict=True
        )
        assert len(set(rows)) == 1 and all(np.diff(columns) > cell)
    assert corners[1, 1, 0][0] > corners[2, 1, 0][0] + cell


def test_the_command_is_deterministic_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pages = [Path("runs") / f"features-{number}.png" for number in (1, 2, 3)]
    assert main(["features", "--steps", "2"]) == main(["features", "--steps", "2"]) == 0
    assert str(pages[1]) in capsys.readouterr().out
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert main(["features", "--steps", "2", "--prompt", "a red ball"]) == 0
    assert pages[2].read_bytes() != pages[0].read_bytes()
    assert sorted(Path("runs").iterdir()) == pages


def test_images_of_odd_and_different_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = [save_image(Path("a.png"), (101, 67)), save_image(Path("b.png"), (70, 133), 1)]
    assert main(["features", *images, "--steps", "1"]) == 0
    with Image.open("runs/features-1.png") as page:
        assert page.format == "PNG" and page.width > page.height
    assert main(["features", images[0], images[0], "--steps", "1"]) == 0


def test_maps_have_the_aspect_ratio_of_their_image() -> None:
    for size, expected in (((120, 80), (312, 208)), ((80, 150), (111, 208))):
        image = Image.new("RGB", size)
        frame = features.Frame("a", image, image)
        assert features.enlarge_map(Image.new("RGB", (8, 8)), frame, 208).size == expected


REFUSED = {
    "one image": (["{a}"], "expected two images or none, got 1"),
    "three images": (["{a}", "{a}", "{a}"], "got 3"),
    "missing image": (["{a}", "{folder}/nowhere.png"], "nowhere.png"),
    "not an image": (["{a}", "{text}"], "not an image"),
    "long and thin": (["{a}", "{strip}"], "longer than 8 to 1"),
    "step 0": (["--steps", "0"], "--steps must be 1 to 50, got 0"),
    "step 51": (["--steps", "35", "51"], "--steps must be 1 to 50, got 51"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_input_gives_a_one_line_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"folder": str(tmp_path), "a": save_image(tmp_path / "a.png", (80, 64))}
    files["strip"] = save_image(tmp_path / "strip.png", (700, 64))
    (tmp_path / "text.txt").write_text("hello")
    files["text"] = str(tmp_path / "text.txt")
    before = sorted(tmp_path.iterdir())
    arguments, expected = REFUSED[name]
    assert main(["features", *(argument.format(**files) for argument in arguments)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("minidrag: ") and expected in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_model_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    assert main(["features", "--model", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_default_arguments() -> None:
    parser = argparse.ArgumentParser()
    features.add_arguments(parser)
    args = parser.parse_args([])
    frames, prompt = features.read_frames(args)
    assert len(frames) == 2 and prompt
    assert EditConfig.official().levels in args.steps
