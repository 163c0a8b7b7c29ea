"""Files of a run: all of them or none, folder names, and the frames of the animation."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from PIL import Image
from support.command import WRITTEN, listing

from minidrag.app import draw, results
from minidrag.app.options import Options
from minidrag.app.session import Session
from minidrag.config import EditConfig
from minidrag.method.progress import Progress
from minidrag.points import Pixel
from minidrag.system import files, pictures
from minidrag.weights.load import load_model

T = TypeVar("T")
PHOTO_FILE = Path("photo.png")

pytestmark = pytest.mark.usefixtures("workdir")


# The folder


def test_files_appear_together_at_the_end() -> None:
    out = Path("some/out")
    with results.output(out, PHOTO_FILE) as folder:
        assert folder.parent == out, "on the same disk"
        (folder / "b.txt").write_text("b")
        (folder / "a.txt").write_text("a")
        assert [path for path in out.iterdir() if not path.name.startswith(".")] == []
    assert listing(out) == {Path("a.txt"), Path("b.txt")}


def test_a_long_name_of_a_photo_is_cut(workdir: Path) -> None:
    with results.output(None, Path("ü" * 120 + ".png")) as folder:
        assert folder.parent.name == "ü" * 60 + "-1"


def test_files_of_others_are_kept_and_results_are_not_replaced() -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    with results.output(Path("out"), PHOTO_FILE) as folder:
        (folder / "edited.png").write_text("first")
    with (
        pytest.raises(ValueError, match=r"^out has edited.png already: give another --out, or delete them$"),
        results.output(Path("out"), PHOTO_FILE),
    ):
        raise AssertionError("the run began")
    contents = {path.name: path.read_text() for path in Path("out").iterdir()}
    assert contents == {"edited.png": "first", "mine.txt": "mine"}


@pytest.mark.parametrize("name", results.RESULTS)
def test_results_written_meanwhile_are_not_replaced_and_those_of_the_run_are_kept(name: str) -> None:
    with pytest.raises(ValueError, match=f"^out got {name} from another") as error:  # noqa: SIM117
        with results.output(Path("out"), PHOTO_FILE) as folder:
            (folder / "edited.png").write_text("late")
            Path("out", name).write_text("first")
    assert Path("out", name).read_text() == "first"
    _, told, kept = str(error.value).partition("this run's files are in ")
    assert told and Path(kept, "edited.png").read_text() == "late"


def test_of_programs_that_finish_at_once_one_has_the_folder_and_none_loses_its_files() -> None:
    barrier = threading.Barrier(6)

    def finish(number: int) -> str:
        try:
            with results.output(Path("out"), PHOTO_FILE) as folder:
                for name in ("comparison.png", "edited.png"):
                    (folder / name).write_text(str(number))
                barrier.wait()
        except ValueError as error:
            kept = Path(str(error).partition("this run's files are in ")[2])
            assert (kept / "edited.png").read_text() == (kept / "comparison.png").read_text() == str(number)
            return "kept"
        return str(number)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(finish, range(6)))
    (winner,) = set(found) - {"kept"}
    assert found.count("kept") == 5
    assert {Path("out", name).read_text() for name in ("comparison.png", "edited.png")} == {winner}


def test_what_killed_runs_left_is_cleared_and_what_others_write_is_not() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = Path("out", f"{files.PART}{dead.pid}-x1")
    others = [Path("out", f"{files.PART}{os.getpid()}-x2"), Path("out", f".part-elsewhere-{dead.pid}-x3")]
    others += [Path("out/.part-mine"), Path("out/mine.txt")]
    for folder in (left, *others):
        folder.mkdir(parents=True)
        (folder / "edited.png").write_text("half")
    (left.parent / f"{left.name}.safetensors").write_text("half")
    with results.output(Path("out"), PHOTO_FILE) as folder:
        (folder / "edited.png").write_text("whole")
    assert sorted(Path("out").iterdir()) == sorted([*others, Path("out/edited.png")])


def test_a_killed_run_is_cleared_by_the_next() -> None:
    script = "import os, signal\nfrom pathlib import Path\nfrom minidrag.app import results\n"
    script += "with results.output(Path('out'), Path('photo.png')) as folder:\n"
    script += "    (folder / 'edited.png').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    assert subprocess.run([sys.executable, "-c", script], timeout=100).returncode == -signal.SIGKILL
    assert len(listing(Path("out"))) == 2
    with results.output(Path("out"), PHOTO_FILE) as folder:
        assert [path.name for path in Path("out").iterdir()] == [folder.name]


@pytest.mark.parametrize("name", results.RESULTS)
def test_an_input_in_the_folder_is_not_replaced_even_as_a_link(name: str) -> None:
    Path("out").mkdir()
    Path("out", name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"^out has {name} already"), results.output(Path("out"), PHOTO_FILE):
        raise AssertionError("the run began")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full"), SystemExit(1)])
def test_a_failure_leaves_nothing(error: BaseException, workdir: Path) -> None:
    Path("there").mkdir()
    Path("there/mine.txt").write_text("mine")
    before = listing(workdir)
    for out in (Path("a/b/c"), Path("there"), Path("there/new")):
        with pytest.raises(type(error)), results.output(out, PHOTO_FILE) as folder:
            (folder / "edited.png").write_text("half")
            raise error
        assert listing(workdir) == before


def test_a_failed_run_keeps_folders_that_another_program_fills(workdir: Path) -> None:
    with pytest.raises(KeyboardInterrupt), results.output(Path("a/b"), PHOTO_FILE):
        Path("a/other.txt").write_text("of another program")
        raise KeyboardInterrupt
    assert listing(workdir / "a") == {Path("other.txt")}


@pytest.mark.parametrize("out", ["photo.png", "photo.png/a/b"])
def test_a_path_that_cannot_be_a_folder_is_refused_at_once(out: str, workdir: Path) -> None:
    before = listing(workdir)
    with (
        pytest.raises(ValueError, match=f"^{out} cannot be written to: "),
        results.output(Path(out), PHOTO_FILE),
    ):
        raise AssertionError("the run began")
    assert listing(workdir) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_at_once() -> None:
    Path("locked").mkdir(mode=0o500)
    with (
        pytest.raises(ValueError, match="^locked/out cannot be written to: Permission denied$"),
        results.output(Path("locked/out"), PHOTO_FILE),
    ):
        raise AssertionError("the run began")


def test_a_run_without_a_folder_gets_the_first_free_number() -> None:
    for taken in (1, 2, 4):
        Path(f"runs/photo-{taken}").mkdir(parents=True)
    one_photo, other_photo = Path("some/photo.png"), Path("photo.jpg")
    with results.output(None, one_photo) as one, results.output(None, other_photo) as other:
        assert (one.parent, other.parent) == (Path("runs/photo-3"), Path("runs/photo-5"))
    with results.output(None, Path("cat.of.mine.jpg")) as folder:
        assert folder.parent == Path("runs/cat.of.mine-1")
    assert listing(Path("runs/photo-3")) == set()


def test_runs_that_start_at_once_get_different_folders() -> None:
    barrier = threading.Barrier(8)

    def start(_: int) -> Path:
        barrier.wait()
        with results.output(None, PHOTO_FILE) as folder:
            (folder / "edited.png").write_text("mine")
            return folder.parent

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(start, range(8)))
    assert folders == {Path(f"runs/photo-{number}") for number in range(1, 9)}
    assert all(listing(folder) == {Path("edited.png")} for folder in folders)


def test_a_failed_run_without_a_folder_leaves_nothing(workdir: Path) -> None:
    before = listing(workdir)
    with pytest.raises(KeyboardInterrupt), results.output(None, PHOTO_FILE):
        raise KeyboardInterrupt
    assert listing(workdir) == before


# The files


def test_every_file_is_written(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        EditConfig.official(),
        steps=4,
        inversion_steps=3,
        lora_steps=1,
        drag_steps=7,
        tolerance=0,
        track_radius=0,
        size=64,
        keep_background=True,
    )
    model, image = load_model(untrained, device="cpu"), pictures.load_image(Path("photo.png"))
    mask = pictures.load_mask(Path("mask.png"), image.size)
    drags = [(Pixel(30, 40), Pixel(48, 42)), (Pixel(60, 60), Pixel(70, 60))]
    options = Options(Path("photo.png"), drags, mask=Path("mask.png"), config=config)
    stages: dict[str, tuple[int, int]] = {}
    labels: list[str] = []
    decoded: list[torch.Tensor] = []

    class Recording(Progress):
        def __call__(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
            found = list(items)
            stages[name] = len(found), total
            return super().__call__(name, found, total)

    def side_by_side(shown: list[Image.Image], names: list[str]) -> Image.Image:
        labels.extend(names)
        return draw_row(shown, names)

    def decode(model: object, latent: torch.Tensor) -> Image.Image:
        decoded.append(latent)
        return Image.new("RGB", (76, 64))

    draw_row = draw.side_by_side
    monkeypatch.setattr(draw, "side_by_side", side_by_side)
    monkeypatch.setattr(results, "decode", decode)
    progress = Recording(show=False)
    Path("out").mkdir()
    session = Session(model, options, image, mask, progress)
    edit = session.edit()
    results.write(Path("out"), session, edit)
    assert sorted(path.name for path in Path("out").iterdir()) == WRITTEN
    assert len(edit.steps) == 8
    assert stages["animation"] == (3, 3)
    assert len(decoded) == 3
    assert all(latent is edit.steps[i].predicted for latent, i in zip(decoded, (0, 5, 7), strict=True))
    original = "original: handle (red), target (blue); the dark part is kept"
    foreseen = [f"predicted after {i} of 7 updates" for i in (0, 5, 7)]
    rows = [[original, "reconstruction, without the drag", "edit"], [original], foreseen, ["edit"]]
    assert sorted(labels) == sorted(label for row in rows for label in row)
    with Image.open("out/process.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 5
    result = json.loads(Path("out/run.json").read_text())["result"]
    assert result["arrived"] is False and result["distances"] == edit.distances
    assert result["remaining"] == edit.remaining and result["losses"] == edit.losses
    assert result["paths"] == [[list(point) for point in path] for path in edit.paths]
    assert result["seconds"] == progress.seconds and "animation" in progress.seconds


def test_a_drag_that_arrives_at_once_has_one_frame(start: Callable[..., int]) -> None:
    assert start("photo.png", "--drag", "30,40:30,40", "--hold-steps", "0", "--out", "out") == 0
    with Image.open("out/process.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 3  # the original, the start, and the edit
    result = json.loads(Path("out/run.json").read_text())["result"]
    assert result["arrived"] is True and result["losses"] == [] and len(result["paths"][0]) == 1
