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
    mean, axes = features.components(frames)
    rows = np.concatenate([frame.numpy().reshape(24, -1).T for frame in frames])
    expected = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][:3]
    for i in range(3):
        largest = expected[i][np.abs(expected[i]).argmax()]
        np.testing.assert_allclose(axes[i], expected[i] * np.sign(largest), rtol=0, atol=1e-9)
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=0, atol=1e-12)
    variances = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1][:3]
    for frame in frames:
        projected = features.project(frame, mean, axes)
        by_hand = axes.numpy() @ (frame.numpy().reshape(24, -1) - mean.numpy()[:, None])
        np.testing.assert_allclose(projected.numpy().reshape(3, -1), by_hand, rtol=0, atol=1e-9)
    both = np.concatenate([features.project(f, mean, axes).numpy().reshape(3, -1) for f in frames], axis=1)
    np.testing.assert_allclose(both.var(axis=1, ddof=1), variances, rtol=1e-9)


def test_signs_do_not_depend_on_the_order_of_positions() -> None:
    frames = random_frames((5, 7), (6, 4))
    mean, axes = features.components(frames)
    reordered = [frame.flip(2) for frame in reversed(frames)]
    torch.testing.assert_close(features.components(reordered), (mean, axes), rtol=0, atol=1e-9)
    assert (axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_colors_are_projections_scaled_to_their_joint_range() -> None:
    frames = random_frames((6, 9), (8, 5))
    mean, axes = features.components(frames)
    parts = [features.project(frame, mean, axes).numpy() for frame in frames]
    joint = np.concatenate([part.reshape(3, -1) for part in parts], axis=1)
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
    page = features.features_page(model, frames, prompt, [2, 1], [4, 2])
    text = model.encode_text(prompt)
    found = [
        features.inverted_features(model, frame.image, text, [2, 1], Progress(show=False)) for frame in frames
    ]
    pixels, cell = np.asarray(page), features.SIDE
    positions: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for step in (2, 1):
        for block in (4, 2):
            for image in features.to_colors([frame[step][block - 1] for frame in found]):
                expected = np.asarray(image.resize((cell, cell), Image.Resampling.NEAREST))
                rows, columns = np.nonzero((pixels == expected[0, 0]).all(axis=-1))
                matches = [
                    (int(row), int(column))
                    for row, column in zip(rows, columns, strict=True)
                    if np.array_equal(pixels[row : row + cell, column : column + cell], expected)
                ]
                assert len(matches) == 1
                positions.setdefault((step, block), []).extend(matches)
    for (step, block), ((row, before), (same_row, after)) in positions.items():
        assert row == same_row and before + cell < after
        assert after < positions[step, 2][0][1] or block == 2  # in the order requested
        assert row < positions[1, block][0][0] or step == 1


def test_the_command_is_deterministic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "new" / name for name in ("one.png", "two.png")]
    for file in files:
        assert main(["features", "--steps", "2", "--out", str(file)]) == 0
        assert str(file) in capsys.readouterr().out
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["one.png", "two.png"]
    other = tmp_path / "other.png"
    assert main(["features", "--steps", "2", "--prompt", "a red ball", "--out", str(other)]) == 0
    assert other.read_bytes() != files[0].read_bytes()


def test_images_of_odd_and_different_sizes(tmp_path: Path) -> None:
    images = [save_image(tmp_path / "a.png", (101, 67)), save_image(tmp_path / "b.png", (70, 133), 1)]
    out = tmp_path / "page.png"
    assert main(["features", "--steps", "1", "--blocks", "3", "--out", str(out), *images]) == 0
    with Image.open(out) as page:
        assert page.format == "PNG" and page.width > page.height
    same, other = [images[0], images[0]], tmp_path / "other.png"
    assert main(["features", *same, "--steps", "1", "--blocks", "1", "--out", str(other)]) == 0


def test_no_input_and_no_earlier_page_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = [save_image(tmp_path / "a.png", (80, 64)), save_image(tmp_path / "b.png", (80, 64), 1)]
    few = ["features", *images, "--steps", "1", "--blocks", "1"]
    before = (tmp_path / "a.png").read_bytes()
    assert main([*few, "--out", images[0]]) == 2
    assert "a.png exists already: give another --out, or delete it" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before
    assert main(few) == 0 and main(few) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["features-1.png", "features-2.png"]


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
    "block 5": (["--blocks", "5"], "--blocks must be 1 to 4, got 5"),
    "block 0": (["--blocks", "3", "0"], "--blocks must be 1 to 4, got 0"),
    "not a png": (["--out", "{folder}/page.jpg"], "page.jpg"),
    "a file as folder": (["--steps", "1", "--out", "{text}/page.png"], "text.txt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_input_gives_a_one_line_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"folder": str(tmp_path), "a": save_image(tmp_path / "a.png", (80, 64))}
    files["strip"] = save_image(tmp_path / "strip.png", (700, 64))
    (tmp_path / "text.txt").write_text("hello")
    files["text"] = str(tmp_path / "text.txt")
    before = sorted(tmp_path.iterdir())
    arguments, expected = REFUSED[name]
    out = ["--out", str(tmp_path / "page.png")] if "--out" not in arguments else []
    assert main(["features", *(argument.format(**files) for argument in arguments), *out]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("minidrag: ") and expected in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_model_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    out = tmp_path / "page.png"
    assert main(["features", "--model", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not out.exists()


def test_default_arguments() -> None:
    parser = argparse.ArgumentParser()
    features.add_arguments(parser)
    args = parser.parse_args([])
    frames, prompt = features.read_frames(args)
    assert len(frames) == 2 and prompt
    assert EditConfig.official().levels in args.steps and args.blocks == [1, 2, 3, 4]
