"""Files of a run: all of them or none, folder names, and the frames of the animation."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from PIL import Image
from support.command import WRITTEN, listing

from minidrag import images
from minidrag.app import draw, runs
from minidrag.app.options import Options
from minidrag.app.progress import Progress
from minidrag.config import EditConfig
from minidrag.edit import drag_edit
from minidrag.points import Pixel
from minidrag.weights.model import load_model

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("workdir")


# The folder


def test_files_appear_together_at_the_end() -> None:
    out = Path("some/out")
    with runs.output(out) as folder:
        assert folder.parent == out, "on the same disk"
        (folder / "b.txt").write_text("b")
        (folder / "a.txt").write_text("a")
        assert [path for path in out.iterdir() if not path.name.startswith(".")] == []
    assert listing(out) == {Path("a.txt"), Path("b.txt")}


def test_files_of_an_earlier_run_are_replaced_and_others_kept() -> None:
    Path("out").mkdir()
    Path("out/edited.png").write_text("old")
    Path("out/mine.txt").write_text("mine")
    with runs.output(Path("out")) as folder:
        (folder / "edited.png").write_text("new")
    contents = {path.name: path.read_text() for path in Path("out").iterdir()}
    assert contents == {"edited.png": "new", "mine.txt": "mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full"), SystemExit(1)])
def test_a_failure_leaves_nothing(error: BaseException, workdir: Path) -> None:
    Path("there").mkdir()
    Path("there/mine.txt").write_text("mine")
    before = listing(workdir)
    for out in (Path("a/b/c"), Path("there"), Path("there/new")):
        with pytest.raises(type(error)), runs.output(out) as folder:
            (folder / "edited.png").write_text("half")
            raise error
        assert listing(workdir) == before


def test_a_failed_run_keeps_folders_that_another_program_fills(workdir: Path) -> None:
    with pytest.raises(KeyboardInterrupt), runs.output(Path("a/b")):
        Path("a/other.txt").write_text("of another program")
        raise KeyboardInterrupt
    assert listing(workdir / "a") == {Path("other.txt")}


@pytest.mark.parametrize("out", ["photo.png", "photo.png/a/b"])
def test_a_path_that_cannot_be_a_folder_is_refused_at_once(out: str, workdir: Path) -> None:
    before = listing(workdir)
    with pytest.raises(ValueError, match=f"^{out} cannot be written to: "), runs.output(Path(out)):
        raise AssertionError("the run began")
    assert listing(workdir) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_at_once() -> None:
    Path("locked").mkdir(mode=0o500)
    with (
        pytest.raises(ValueError, match="^locked/out cannot be written to: Permission denied$"),
        runs.output(Path("locked/out")),
    ):
        raise AssertionError("the run began")


def test_next_folder() -> None:
    assert runs.next_folder(Path("some/cat.of.mine.jpg")) == Path("runs/cat.of.mine-1")
    for taken in (1, 2, 4):
        Path(f"runs/photo-{taken}").mkdir(parents=True)
    assert runs.next_folder(Path("photo.png")) == Path("runs/photo-3")


# The files


def test_rescale_maps_borders_to_borders() -> None:
    corners = [Pixel(-0.5, -0.5), Pixel(95.5, 79.5), Pixel(x=0, y=2)]
    assert runs.rescale(corners, (96, 80), (192, 240)) == [(-0.5, -0.5), (191.5, 239.5), (0.5, 7)]
    assert all(type(point) is Pixel for point in runs.rescale(corners, (96, 80), (192, 240)))


def test_every_file_is_written(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        EditConfig.official(),
        steps=4,
        inversion_steps=3,
        lora_steps=0,
        drag_steps=7,
        tolerance=0,
        track_radius=0,
        size=64,
        keep_background=True,
    )
    model, image = load_model(untrained, device="cpu"), images.load_image(Path("photo.png"))
    mask = images.load_mask(Path("mask.png"), image.size)
    drags = [(Pixel(30, 40), Pixel(48, 42)), (Pixel(60, 60), Pixel(70, 60))]
    options = Options(Path("photo.png"), drags, mask=Path("mask.png"), config=config)
    edit = drag_edit(model, image, options.handles, options.targets, mask=mask, config=config)
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
    monkeypatch.setattr(runs, "decode", decode)
    progress = Recording(show=False)
    Path("out").mkdir()
    runs.write(Path("out"), model, image, mask, options, edit, progress)
    assert sorted(path.name for path in Path("out").iterdir()) == WRITTEN
    assert len(edit.steps) == 8
    assert stages == {"animation": (3, 3)}
    assert len(decoded) == 3
    assert all(latent is edit.steps[i].predicted for latent, i in zip(decoded, (0, 5, 7), strict=True))
    original = "original: drag red to blue, dark stays"
    foreseen = [f"foreseen after {i} of 7 steps" for i in (0, 5, 7)]
    rows = [[original, "reconstruction, without the drag", "edit"], [original], foreseen, ["edit"]]
    assert sorted(labels) == sorted(label for row in rows for label in row)
    with Image.open("out/process.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 5
    result = json.loads(Path("out/run.json").read_text())["result"]
    assert result["arrived"] is False and result["distances"] == edit.distances
    assert result["remaining"] == edit.remaining and result["losses"] == edit.losses
    assert result["paths"] == [[list(point) for point in path] for path in edit.paths]
    assert result["seconds"] == progress.seconds and list(progress.seconds) == ["animation"]


def test_a_drag_that_arrives_at_once_has_one_frame(start: Callable[..., int]) -> None:
    assert start("photo.png", "--drag", "30,40:30,40", "--out", "out") == 0
    with Image.open("out/process.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 3  # the original, the start, and the edit
    result = json.loads(Path("out/run.json").read_text())["result"]
    assert result["arrived"] is True and result["losses"] == [] and len(result["paths"][0]) == 1
