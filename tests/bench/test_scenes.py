"""The measures beside independent code, and runs over scenes: resumed, repeated, and by hand."""

import argparse
import importlib
import json
import math
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from minidrag.bench import ablate, cases, harness, metrics, scenes, tables
from minidrag.bench.cases import KINDS, Case, Edited, make_case, make_cases, measure, pasted
from minidrag.bench.placement import place
from minidrag.config import EditConfig
from minidrag.tiny.scenes import SIDE, render


def picture(seed: int, width: int = 13, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def learned(case: Case, result: Image.Image) -> cases.Measures:
    """In place of MD and IF, something that depends on the result."""
    level = float(np.asarray(result).mean())
    return {"MD": level, "IF": level / 255}


def to_truth(case: Case) -> Edited:
    """An editor that is always right and, where the mask does not hide it, a little too bright."""
    raw = Image.fromarray(np.asarray(case.truth) // 2 + 64)
    return Edited(case.truth, raw, {"drag": 2.0})


# The measures


def test_psnr_by_hand() -> None:
    one = np.full((4, 5, 3), 100, np.uint8)
    other = one.copy()
    other[0, 0] = 110
    where = np.zeros((4, 5), bool)
    where[0, :2] = True
    pictures = Image.fromarray(one), Image.fromarray(other)
    assert metrics.psnr(*pictures) == pytest.approx(10 * math.log10(255**2 / (100 / 20)))
    assert metrics.psnr(*pictures, where) == pytest.approx(10 * math.log10(255**2 / 50))
    assert metrics.psnr(*pictures, ~where) == metrics.SAME


def slow_ssim(one: Image.Image, other: Image.Image) -> np.ndarray:
    """SSIM at every pixel, as Wang et al. write it, in loops."""
    x, y = np.asarray(one, float), np.asarray(other, float)
    height, width, _ = x.shape
    found = np.zeros(x.shape)
    for row in range(height):
        for column in range(width):
            total, sums = 0.0, np.zeros((5, 3))
            for down in range(-5, 6):
                for right in range(-5, 6):
                    r, c = row + down, column + right
                    r = -1 - r if r < 0 else 2 * height - 1 - r if r >= height else r
                    c = -1 - c if c < 0 else 2 * width - 1 - c if c >= width else c
                    weight = math.exp(-(down**2 + right**2) / (2 * 1.5**2))
                    a, b = x[r, c], y[r, c]
                    total += weight
                    sums += weight * np.array([a, b, a * a, b * b, a * b])
            mx, my, xx, yy, xy = sums / total
            c1, c2 = 2.55**2, 7.65**2
            top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
            found[row, column] = top / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
    return found


def test_ssim_beside_loops() -> None:
    one, other = picture(0), picture(1)
    wanted = slow_ssim(one, other)
    where = np.zeros((12, 13), bool)
    where[3:6, 2:9] = True
    assert metrics.ssim(one, other) == pytest.approx(wanted.mean(), abs=1e-12)
    assert metrics.ssim(one, other, where) == pytest.approx(wanted[where].mean(), abs=1e-12)
    assert metrics.ssim(one, other) == pytest.approx(metrics.ssim(other, one))
    assert metrics.ssim(one, one) == pytest.approx(1)


def test_bootstrap() -> None:
    rng = random.Random(0)
    values = [rng.gauss(5, 2) for _ in range(80)]
    means = sorted(sum(rng.choices(values, k=80)) / 80 for _ in range(4000))
    assert metrics.bootstrap(values) == pytest.approx((means[100], means[-101]), abs=0.08)
    assert metrics.bootstrap(values) == metrics.bootstrap(values)
    assert metrics.bootstrap([3.0, 3.0]) == (3.0, 3.0)
    assert metrics.bootstrap([7.0]) == (7.0, 7.0)


def test_rank_correlation() -> None:
    one, other = [3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 7.0, 1.0, 8.0, 2.5]
    squares = sum((a - b) ** 2 for a, b in zip((2, 0, 3, 1, 4), (1, 3, 0, 4, 2), strict=True))
    assert metrics.rank_correlation(one, other) == pytest.approx(1 - 6 * squares / (5 * 24))
    assert metrics.ranks([5, 1, 5, 5, 0]).tolist() == [3, 1, 3, 3, 0]
    assert metrics.rank_correlation([1, 2, 3, 4], [1, 8, 27, 1000]) == pytest.approx(1)
    assert metrics.rank_correlation([1, 2, 3], [5, 5, 5]) is None
    assert metrics.rank_correlation([1, 2], [2, 1]) is None


def slow_matches(before: Tensor, after: Tensor, handles: list, size: tuple[int, int]) -> list:
    """Enlarges everything and compares pixel by pixel."""
    one, other = (
        interpolate(part[None], size=size[::-1], mode="bilinear", align_corners=False)[0]
        for part in (before, after)
    )
    found = []
    for x, y in handles:
        sought = one[:, round(y), round(x)]
        best, place_ = -2.0, (0, 0)
        for row in range(size[1]):
            for column in range(size[0]):
                here = other[:, row, column]
                cosine = float(sought @ here / (sought.norm() * here.norm()))
                if cosine > best:
                    best, place_ = cosine, (column, row)
        found.append(place_)
    return found


def test_matches_beside_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", 3)
    rng = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 7, 4, 5, generator=rng, dtype=torch.float64)
    handles, size = [(0.0, 0.0), (17.4, 3.6), (9.0, 12.0)], (22, 15)
    assert metrics.matches(before, after, handles, size) == slow_matches(before, after, handles, size)


def test_mean_distance_without_an_edit_is_the_length_of_the_drags() -> None:
    features = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    handles, targets = [(10.0, 20.0), (30.2, 5.0)], [(13.0, 24.0), (30.0, 5.0)]
    found = metrics.distances(features, features, handles, targets, (40, 40))
    assert np.mean(found) == pytest.approx((5 + 0) / 2)


def test_picture_features_are_the_mean_over_eight_draws_of_noise() -> None:
    asked = {}

    def unet(noisy: Tensor, timestep: Tensor, text: Tensor) -> types.SimpleNamespace:
        asked.update(noisy=noisy, timestep=timestep, text=text)
        return types.SimpleNamespace(features=[noisy * level for level in (1, 2, 3, 4)])

    def add_noise(clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        return clean + noise

    model: Any = types.SimpleNamespace(unet=unet, schedule=types.SimpleNamespace(add_noise=add_noise))
    model.encode_text = lambda prompt: torch.zeros(1, 77, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "encode", lambda *_: (torch.ones(1, 4, 2, 3), None))
        found = metrics.picture_features(model, picture(0), "a ball")
    noise = torch.randn(8, 4, 2, 3, generator=torch.Generator().manual_seed(42))
    assert torch.allclose(found, 2 * (1 + noise).double().mean(0))
    assert asked["timestep"].tolist() == [261] * 8 and len(asked["text"]) == 8


class Distance(nn.Module):
    """In place of LPIPS: how far two pictures are apart."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        assert one.shape == other.shape == (1, 3, 224, 224) and one.abs().max() <= 1
        return (one - other).abs().mean().reshape(1, 1, 1, 1)


def test_image_fidelity() -> None:
    one, other = picture(0, 30, 20), picture(1, 30, 20)
    assert metrics.image_fidelity(Distance(), one, one) == 1
    changed = metrics.image_fidelity(Distance(), one, other)
    assert changed == pytest.approx(metrics.image_fidelity(Distance(), other, one)) and changed < 1


@pytest.mark.slow
def test_lpips_itself() -> None:
    try:
        network = metrics.fidelity_network()
    except metrics.Missing as reason:
        pytest.skip(str(reason))
    one, other = picture(0, 64, 64), picture(1, 64, 64)
    assert metrics.image_fidelity(network, one, one) == pytest.approx(1, abs=1e-6)
    both = [metrics.image_fidelity(network, *pair) for pair in ((one, other), (other, one))]
    assert both[0] == pytest.approx(both[1], abs=1e-5) and both[0] < 0.9


def offline(**_: object) -> None:
    raise OSError("no route to host\nat all")


@pytest.mark.parametrize(
    ("package", "words"),
    [
        (ImportError(), "needs the package lpips"),
        (types.SimpleNamespace(LPIPS=offline), r"cannot be fetched \(no route to host\)"),
    ],
)
def test_missing_lpips_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, package: object, words: str
) -> None:
    def import_module(name: str) -> object:
        if isinstance(package, Exception):
            raise package
        return package

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(metrics.Missing, match=f"IF is left out: .*{words}"):
        metrics.fidelity_network()


# The cases


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_the_same_whatever_other_cases_there_are(kind: str) -> None:
    case = make_case(kind, 1, 3)
    assert case.kind == cases.kind_of(case.drag) == kind
    (other,) = [case for case in make_cases(4, [kind, "light"], 3) if case.name == f"{kind}-001"][:1]
    assert (other.scene, other.drag.name, other.drag.targets) == (
        case.scene,
        case.drag.name,
        case.drag.targets,
    )
    assert make_case(kind, 1, 4).scene != case.scene


def test_kinds_take_turns() -> None:
    names = [case.name for case in make_cases(5, ["light", "peak"], 0)]
    assert names == ["light-000", "peak-000", "light-001", "peak-001", "light-002"]


def test_scissors_put_the_thing_at_its_target_and_nothing_elsewhere() -> None:
    case = make_case("object", 0, 0)
    result = pasted(case)
    found = place(result, case.scene, case.drag)
    assert not found.lost and found.distance < 1
    assert (np.asarray(result) == np.asarray(case.before))[~case.mask].all()


def test_a_hole_is_filled_from_its_border() -> None:
    ramp = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 12, axis=0).repeat(3, axis=2)
    hole = np.zeros((12, 20), bool)
    hole[4:8, 6:13] = True
    damaged = np.where(hole[..., None], 255, ramp).astype(np.uint8)
    assert np.abs(cases.fill(damaged, hole).astype(int) - ramp).max() <= 1


def test_no_edit_by_hand() -> None:
    case = make_case("object", 1, 0)
    row = measure(case, case.before, case.before, learned)
    ways = [math.dist(*pair) for pair in zip(case.drag.handles, case.drag.targets, strict=True)]
    before, truth = (np.asarray(some, float)[case.mask] for some in (case.before, case.truth))
    assert row["distance"] == pytest.approx(ways[0], abs=0.2)
    assert row["share"] == pytest.approx(1, abs=0.02) and row["lost"] is False and row["arrived"] is False
    assert row["PSNR inside"] == pytest.approx(10 * math.log10(255**2 / ((before - truth) ** 2).mean()))
    assert row["PSNR outside"] == metrics.SAME and row["SSIM outside"] == pytest.approx(1, abs=1e-3)


def test_outside_the_mask_the_decoders_own_picture_counts() -> None:
    case = make_case("light", 1, 0)
    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    row = measure(case, case.truth, grey, learned)
    assert row["PSNR inside"] == metrics.SAME
    assert row["PSNR outside"] == pytest.approx(metrics.psnr(grey, case.truth, ~case.mask))
    lost = measure(case, grey, grey, learned)
    assert lost["lost"] is True and lost["distance"] is None and lost["share"] is None
    assert lost["arrived"] is False and measure(case, case.truth, grey, learned)["arrived"] is True


# Runs


class Counting:
    """An editor that counts its calls and, at the one given, fails."""

    def __init__(self, stop: int = 0, error: type[BaseException] = KeyboardInterrupt):
        self.calls, self.stop, self.error = 0, stop, error

    def __call__(self, case: Case) -> Edited:
        self.calls += 1
        if self.calls == self.stop:
            raise self.error("stop")
        return to_truth(case)


def run(out: Path, edit: Callable[[Case], Edited], count: int = 3) -> list[dict]:
    some = make_cases(count, ["object", "light"], 1)
    results = harness.run_cases(some, edit, learned, out, compare=False)
    scenes.write_report(results, out)
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run(out, to_truth)
    return out


def test_a_stopped_run_goes_on_to_the_same_table(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counting(stop=2))
    again = Counting()
    run(tmp_path, again)
    assert again.calls == 2
    for name in ("table.json", "table.md", "sheet.png"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_broken_case_is_told_of_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(tmp_path, Counting(stop=1, error=FloatingPointError), count=2)
    assert [result["case"] for result in results] == ["light-000"]
    assert "object-000 failed: stop" in capsys.readouterr().err
    assert len(run(tmp_path, to_truth, count=2)) == 2


def test_the_table_holds_the_means_of_its_cases(finished: Path) -> None:
    table = json.loads((finished / "table.json").read_text())
    results = [json.loads(file.read_text()) for file in sorted(finished.glob("cases/*/result.json"))]
    assert table["cases"] == len(results) == 3 and set(table["kinds"]) == {"all", "object", "light"}
    for name in ("distance", "PSNR outside", "MD"):
        values = [result["rows"]["edit"][name] for result in results]
        cell = table["kinds"]["all"]["edit"][name]
        assert cell["mean"] == pytest.approx(sum(values) / 3) and cell["count"] == 3
        assert cell["low"] <= cell["mean"] <= cell["high"]
    alone = table["kinds"]["light"]["edit"]["distance"]
    assert alone["low"] == alone["mean"] == alone["high"] < 0.3
    assert json.loads((finished / "seconds.json").read_text())["drag"] == 2


def test_the_report_shows_what_is_known(finished: Path) -> None:
    text = (finished / "table.md").read_text()
    assert "| light" in text and "| all" in text and "Rank correlation of MD and distance" in text
    no_if = json.loads((finished / "table.json").read_text())
    for rows in no_if["kinds"].values():
        rows["edit"]["IF"] = None
    assert "| IF" in text and "| IF" not in tables.report(no_if)


def test_lost_things_have_no_distance_and_the_means_are_of_the_others() -> None:
    rows = [{"distance": 4.0, "lost": False}, {"distance": None, "lost": True}]
    found = tables.means(rows)
    assert found["distance"] == {"mean": 4.0, "low": 4.0, "high": 4.0, "count": 1}
    assert found["lost"] and found["lost"]["mean"] == 0.5 and found["MD"] is None


def test_reference_rows_without_a_model() -> None:
    case = make_case("light", 0, 0)
    found = cases.references(case, None)
    assert set(found) == {"no edit", "cut and paste"}
    assert found["no edit"].tobytes() == render(case.scene).tobytes()


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = harness.open_out(None, {"seed": 0})
    assert out == harness.open_out(None, {"seed": 0}) != harness.open_out(None, {"seed": 1})
    with pytest.raises(ValueError, match="other settings"):
        harness.open_out(out, {"seed": 1})


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scenes.add_arguments(parser)
    return parser.parse_args(words)


def test_settings_from_the_command_line() -> None:
    config = harness.read_config(
        arguments("--config", "official", "--set", "lora_steps=40", "mask_weight=0.5", "lora_targets=qkv")
    )
    assert (config.lora_steps, config.mask_weight, config.lora_targets) == (40, 0.5, "qkv")
    assert config.motion_loss == EditConfig.official().motion_loss
    assert config.keep_background == EditConfig.official().keep_background
    assert harness.read_config(arguments("--config", "paper")) == EditConfig.paper()
    assert harness.read_config(arguments()) == EditConfig()
    for wrong in ("lora_stepps=3", "lora_steps=many", "lora_steps"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            harness.read_config(arguments("--set", wrong))
    with pytest.raises(SystemExit):
        arguments("--cases", "0")


# Ablations


def test_usual_values_are_possible() -> None:
    for field, values in ablate.VALUES.items():
        for value in values:
            assert getattr(ablate.configured(EditConfig(), {field: value}), field) == value
    assert ablate.chosen_values("block", ["1", "3"]) == (1, 3)
    with pytest.raises(ValueError, match="--values"):
        ablate.chosen_values("size", None)


def test_an_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    used = []

    def editor(model: object, config: EditConfig, seed: int) -> Callable[[Case], Edited]:
        used.append(config.block)
        return to_truth

    monkeypatch.setattr(ablate, "editor", editor)
    monkeypatch.setattr(ablate, "load", lambda args: None)
    monkeypatch.setattr(ablate, "fidelity", lambda: None)
    monkeypatch.setattr(ablate, "learned_measures", lambda model, network: learned)
    monkeypatch.setattr(ablate, "settings_of", lambda model, config, *_: {"block": config.block})
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    words = ["--over", "block", "--values", "1", "2", "--cases", "1", "--kinds", "light"]
    assert ablate.run(parser.parse_args([*words, "--out", str(tmp_path)])) == 0
    assert used == [1, 2]
    table = json.loads((tmp_path / "block.json").read_text())
    assert list(table) == ["no edit", "1", "2"]
    assert table["no edit"]["share"]["mean"] == pytest.approx(1, abs=0.05)
    assert ablate.curve(table, "distance") == (["1", "2"], [table[v]["distance"]["mean"] for v in ("1", "2")])
    assert ablate.report("block", table) in capsys.readouterr().out


def test_the_plot_draws_the_tables_numbers(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = {}

    def close(figure) -> None:
        for axis in figure.axes:
            (line,) = axis.lines
            drawn[axis.get_ylabel()] = list(line.get_ydata())

    cell = {"low": 0, "high": 9, "count": 2}
    table: ablate.Table = {
        str(i): {name: {"mean": i * 1.5, **cell} for name in tables.MEASURES} for i in range(3)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", close)
        ablate.plot("block", table, tmp_path / "plot.png")
        assert drawn == {name: [0, 1.5, 3.0] for name in ("MD", "IF", "distance", "arrived")}
        drawn.clear()
        ablate.plot(
            "block", {value: row | {"IF": None} for value, row in table.items()}, tmp_path / "less.png"
        )
    assert drawn == {name: [0, 1.5, 3.0] for name in ("MD", "distance", "arrived")}
