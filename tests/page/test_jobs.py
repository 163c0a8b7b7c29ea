"""Edits through the page: what they write, Stop and reload in every stage, and what a crash leaves."""

import io
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from support.command import ROOT, WRITTEN, demo, listing, raising
from support.page import QUICK, Client, serving, until

from minidrag import images
from minidrag.config import EditConfig
from minidrag.page import plan
from minidrag.page.editor import in_words
from minidrag.page.job import Job
from minidrag.page.preview import LatentPreview
from minidrag.page.serve import main
from minidrag.system import pictures
from minidrag.weights.load import load_model

STAGES = ["LoRA", "inversion", "drag", "denoising", "animation"]


@pytest.fixture
def client(workdir: Path, untrained: Path) -> Iterator[Client]:
    with serving(workdir / "photo.png", untrained) as client:
        yield client


@pytest.fixture
def at_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], None]:
    """at_stage(stage, act) lets `act` happen after the first step of a stage, while the step is under way."""

    def at_stage(stage: str, act: Callable[[], object]) -> None:
        check = Job.check

        def acting(job: Job) -> None:
            if job.stage == stage and job.done == (0 if stage == "model" else 1) and job.kind == "edit":
                act()
            check(job)

        monkeypatch.setattr(Job, "check", acting)

    return at_stage


def start(client: Client, **values: Any) -> int:
    return client.post("/submit", client.options(**values))["number"]


# What an edit writes


def test_an_edit_of_the_page_is_that_of_the_command_byte_for_byte(client: Client, workdir: Path) -> None:
    mask = client.upload("/mask", workdir / "mask.png")["mask"]
    asked = client.options(mask=mask, prompt="a red ball", seed=3)
    job = client.wait(client.post("/submit", asked)["number"])
    assert (job["state"], job["run"]) == ("done", "photo-1"), job
    made = sorted(path.name for path in Path("runs/photo-1").iterdir())
    assert made == sorted([*WRITTEN, "raw.png"])
    Path("asked.json").write_text(json.dumps(asked))
    for source, out in (("asked.json", "again"), ("runs/photo-1/run.json", "again2")):
        assert demo.main(["--from", source, "--out", out]) == 0
        for name in WRITTEN[:-1]:
            assert Path(out, name).read_bytes() == Path("runs/photo-1", name).read_bytes(), (source, name)
        ours, theirs = (json.loads(Path(place, "run.json").read_text()) for place in ("runs/photo-1", out))
        for values in (ours, theirs):
            del values["result"]["seconds"]
        assert ours == theirs


def test_the_page_sees_where_an_edit_is_and_what_came_of_it(
    client: Client, at_stage: Callable[[str, Callable[[], object]], None]
) -> None:
    seen: list[dict[str, Any]] = []
    at_stage("drag", lambda: seen.append(client.job(1)))
    job = client.wait(start(client))
    (during,) = seen
    assert (during["stage"], during["done"], during["total"], during["state"]) == ("drag", 1, 2, "running")
    assert during["seconds_left"] > 0 and during["previews"] and len(during["paths"][0]) == 2
    assert job["notes"][0].startswith("handle 1 moved ") and "--" not in " ".join(job["notes"])
    result = client.get("/run?name=photo-1")
    assert result["result"]["paths"] == job["paths"] and result["options"]["drags"] == job["values"]["drags"]
    status, headers, content = client.ask("GET", f"/preview?job={job['number']}")
    assert status == 200 and headers["Content-Type"] == "image/png" and content.startswith(b"\x89PNG")
    (entry,) = client.get("/history")
    assert entry["name"] == "photo-1" and set(entry["files"]) == set(WRITTEN)
    for file in entry["files"]:
        assert (
            client.ask("GET", f"/file?name=photo-1&file={file}")[2] == Path("runs/photo-1", file).read_bytes()
        )
    assert client.ask("GET", "/thumb?name=photo-1")[0] == 200
    assert client.post("/check", client.options())["seconds"]["now"] > 0, "measured by now"


def test_notes_come_before_an_edit_and_name_no_options(client: Client) -> None:
    until(lambda: client.get("/state")["model"])
    found = client.post("/check", client.options())
    assert found["error"] is None and found["ready"] is False
    assert "there is no prompt: describing the image usually helps" in found["notes"]
    assert found["seconds"] == dict.fromkeys(["default", "fast", "official", "paper", "now"])
    assert (
        "outside the image"
        in client.post("/check", client.options(drags=[{"handle": [0, 0], "target": [99, 0]}]))["error"]
    )
    assert (
        in_words("try --lora-lr, or mark more in --mask (--mask FILE)")
        == "try lora lr, or mark more in the mask"
    )
    assert (
        in_words("run `hf download --local-dir X`, or try --size")
        == "run `hf download --local-dir X`, or try size"
    )


def test_a_generated_image_is_dragged_as_the_command_does(client: Client) -> None:
    told = {"image": None, "prompt": "a red ball", "negative": "snow", "guidance": 3.0, "seed": 5}
    job = client.wait(start(client, **told, drags=[]))
    assert (job["state"], job["run"]) == ("done", "generated-1")
    assert [path.name for path in Path("runs/generated-1").iterdir()] == ["generated.png"]
    shown = client.ask("GET", f"/image?name={Path('runs/generated-1/generated.png').resolve()}")
    assert shown[0] == 200 and client.get("/history") == []
    asked = client.options(**told)
    assert client.wait(client.post("/submit", asked)["number"])["run"] == "generated-2"
    Path("asked.json").write_text(json.dumps(asked))
    assert demo.main(["--from", "asked.json", "--out", "again"]) == 0
    for name in ("generated.png", *WRITTEN[:-1]):
        assert Path("again", name).read_bytes() == Path("runs/generated-2", name).read_bytes(), name
    assert client.get("/run?name=generated-2")["options"]["image"] is None
    dropped = json.loads(Path("runs/generated-2/run.json").read_text())
    found = client.post("/match", dropped)
    assert found["generated"] and found["image"] == str(Path("runs/generated-2/generated.png").resolve())
    assert client.post("/match", dropped | {"seed": 6})["image"] is None
    client.post("/submit", asked | {"prompt": ""}, status=400)


# Stop and reload


@pytest.mark.parametrize("stage", ["model", *STAGES])
def test_stop_ends_within_a_step_and_keeps_what_there_is(
    client: Client, at_stage: Callable[[str, Callable[[], object]], None], stage: str, workdir: Path
) -> None:
    before = listing(workdir)
    at_stage(stage, lambda: client.post("/stop", {"number": 1}))
    job = client.wait(start(client))
    assert (job["state"], job["stage"]) == ("stopped", stage)
    assert job["done"] == (0 if stage == "model" else 1)
    kept = stage in STAGES[2:]
    assert bool(job["run"]) == kept == bool(client.get("/history"))
    if kept:
        (entry,) = client.get("/history")
        assert entry["stopped"].startswith(f"stopped at {stage} 1 of ")
        assert {"edited.png", "run.json", "lora.safetensors"} <= set(entry["files"])
        with Image.open(f"runs/{job['run']}/edited.png") as image:
            assert image.size == (96, 80)
        assert demo.main(["--from", f"runs/{job['run']}/run.json", "--out", "whole"]) == 0
    else:
        left = {path for path in listing(workdir) - before if path.parts[:2] != ("runs", ".page")}
        assert left <= {Path("runs")}
    assert client.wait(start(client))["state"] == "done", "the next edit is not concerned"


@pytest.mark.parametrize("stage", STAGES)
def test_a_reload_in_any_stage_finds_the_edit_and_the_draft(
    client: Client, at_stage: Callable[[str, Callable[[], object]], None], stage: str
) -> None:
    draft, found = {"edit": {"prompt": stage}}, []
    client.post("/draft", draft)
    again = Client(client.site, client.port)  # another connection, with the token only
    at_stage(stage, lambda: found.append((again.get("/start"), again.get("/state"), again.get("/history"))))
    assert client.wait(start(client))["state"] == "done"
    begun, state, history = found[0]
    (job,) = state["jobs"]
    assert begun["draft"] == draft and (job["stage"], job["state"]) == (stage, "running") and history == []
    assert job["values"]["drags"] == client.options()["drags"]


def test_edits_wait_for_each_other_and_can_be_cancelled(
    client: Client, at_stage: Callable[[str, Callable[[], object]], None]
) -> None:
    go = threading.Event()
    at_stage("inversion", go.wait)
    first, second, third = (start(client, seed=seed) for seed in (1, 2, 3))
    until(lambda: client.job(first)["stage"] == "inversion")
    assert [client.job(number)["state"] for number in (second, third)] == ["waiting"] * 2
    client.post("/stop", {"number": second})
    assert client.job(second)["message"] == "cancelled"
    for wrong in (99, -1, "1", None, [], True):
        assert client.ask("POST", "/stop", json.dumps({"number": wrong}).encode())[0] in (400, 404)
    go.set()
    assert [client.wait(number)["state"] for number in (third, second)] == ["done", "stopped"]
    assert [entry["name"] for entry in client.get("/history")] == ["photo-2", "photo-1"]


# The LoRA that is trained ahead


def test_the_lora_is_trained_ahead_and_used(client: Client) -> None:
    until(lambda: client.get("/state")["model"])
    asked = client.options(drags=[], prompt="a ball", config=QUICK | {"window": False})
    client.post("/prefetch", asked)
    until(lambda: client.get("/state")["prefetch"]["state"] == "done")
    assert client.post("/check", asked)["ready"] is True
    client.post("/prefetch", asked)
    assert client.get("/state")["prefetch"]["state"] == "done", "nothing to be done again"
    client.wait(start(client, **asked | {"drags": client.options()["drags"]}))
    values = json.loads(Path("runs/photo-1/run.json").read_text())
    assert "LoRA" not in values["result"]["seconds"], "it was in the cache"


def test_a_lora_makes_way_for_an_edit_that_does_not_need_it(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, go, check = threading.Event(), threading.Event(), Job.check

    def slow(job: Job) -> None:
        if job.kind == "train" and job.stage == "LoRA":
            going.set()
            go.wait(30)
        check(job)

    monkeypatch.setattr(Job, "check", slow)
    until(lambda: client.get("/state")["model"])
    client.post("/prefetch", client.options(prompt="one"))
    assert going.wait(30)
    number = start(client, prompt="another")
    ahead = client.get("/state")["prefetch"]
    assert ahead["stopping"] and client.job(number)["state"] == "waiting"
    go.set()
    assert client.wait(number)["state"] == "done"
    assert client.get("/state")["prefetch"]["state"] == "stopped"


# The window of a large image

IN_WINDOW = {"config": QUICK | {"window": True}}


@pytest.fixture
def large(client: Client, workdir: Path) -> dict[str, Any]:
    """Options of an edit in a window: a mask of 48x40 in an image of 384x384."""
    Image.radial_gradient("L").resize((384, 384)).convert("RGB").save("large.png")
    mask = Image.new("L", (384, 384))
    mask.paste(255, (230, 240, 278, 280))
    mask.save("part.png")
    image = client.upload("/image", workdir / "large.png")["image"]
    named = {"image": image, "mask": client.upload("/mask", workdir / "part.png")["mask"]}
    until(lambda: client.get("/state")["model"])
    return client.options(**named, **IN_WINDOW, drags=[{"handle": [244, 260], "target": [262, 260]}])


def test_a_check_names_the_window_and_its_lora(client: Client, large: dict[str, Any]) -> None:
    def lora(**values: Any) -> str:
        return client.post("/check", large | values)["lora"]

    checked = client.post("/check", large)
    left, top, width, height = checked["window"]
    assert left < 230 and left + width > 278 and top < 240 and top + height > 280 and width < 150
    assert checked["scale"] == pytest.approx(width / 64) and checked["lora"]
    assert lora(drags=[{"handle": [244, 261], "target": [262, 261]}]) == checked["lora"], "the same window"
    assert lora(drags=[{"handle": [244, 260], "target": [60, 60]}]) not in ("", checked["lora"])
    dragless = client.post("/check", large | {"drags": []})
    assert dragless["lora"] == "" and dragless["error"] is None
    whole = client.post("/check", large | {"config": QUICK | {"window": False}})
    assert whole["window"] is None and whole["scale"] == 6 and whole["lora"] not in ("", checked["lora"])
    assert lora(config=QUICK | {"window": False}, drags=[], mask=None) == whole["lora"], "no need of drags"


def test_the_lora_of_a_window_waits_for_a_drag(client: Client, large: dict[str, Any]) -> None:
    client.post("/prefetch", large | {"drags": []})
    client.post("/prefetch", large | {"drags": [{"handle": [10, 10], "target": [20, 20]}]})  # not in the mask
    assert client.get("/state")["prefetch"]["kind"] == "load"
    client.post("/prefetch", large)
    until(lambda: client.get("/state")["prefetch"]["state"] == "done")
    checked = client.post("/check", large)
    assert checked["ready"] and client.get("/state")["prefetch"]["lora"] == checked["lora"]
    job = client.wait(client.post("/submit", large)["number"])
    result = client.get(f"/run?name={job['run']}")["result"]
    assert "LoRA" not in result["seconds"], "it was trained ahead"
    assert result["window"] == checked["window"] and job["lora"] == checked["lora"]


@pytest.mark.parametrize("stage", ["", "drag"])
def test_a_run_in_a_window_is_one_of_the_whole_image(
    client: Client,
    large: dict[str, Any],
    at_stage: Callable[[str, Callable[[], object]], None],
    stage: str,
) -> None:
    """Whether it ends or is stopped."""
    if stage:
        at_stage(stage, lambda: client.post("/stop", {"number": 1}))
    job = client.wait(client.post("/submit", large)["number"])
    assert job["state"] == ("stopped" if stage else "done"), job
    assert job["paths"][0][0] == pytest.approx([244, 260], abs=1.5)
    _, _, content = client.ask("GET", f"/preview?job={job['number']}")
    shapes = {Image.open(io.BytesIO(content)).size}
    (entry,) = client.get("/history")
    edited = Image.open(f"runs/{entry['name']}/edited.png")
    shapes.add(edited.size)
    assert shapes == {(384, 384)}
    changed = ImageChops.difference(edited, Image.open(large["image"])).convert("L").getbbox()
    assert changed and changed[0] >= 230 and changed[1] >= 240 and changed[2] <= 278 and changed[3] <= 280
    run = client.get(f"/run?name={entry['name']}")
    assert run["options"]["drags"] == large["drags"] and run["options"]["config"]["window"]
    assert run["result"]["paths"] == job["paths"]


def test_a_target_that_the_mask_cuts_is_noted(client: Client, large: dict[str, Any]) -> None:
    def checked(x: int) -> tuple[list[int], str]:
        drag = {"handle": [244, 260], "target": [x, 260]}
        answer = client.post("/check", large | {"drags": [drag], "prompt": "a ball"})
        return answer["cut"], answer["notes"][-1]

    assert checked(290) == ([1], "the target of drag 1 is outside the mask, where nothing can appear")
    assert checked(277) == ([1], "the mask ends at the target of drag 1 and may cut what lands there")
    assert checked(255)[0] == []


# Times and previews


def test_the_time_left_is_that_of_a_steady_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.time, "perf_counter", lambda: 110.0)
    settings: dict[str, Any] = {"warp_start": False, "drag_levels": 1, "drag_steps": 4, "lora_steps": 0}
    settings |= {"steps": 20, "inversion_steps": 10}
    config = EditConfig(**settings)
    # Ten seconds for 5 of 10 evaluations; then 5 and 4 backward passes, 20 of denoising, 1.8 decodings.
    assert plan.remaining(config, "inversion", 5, 10, 100.0, {}) == pytest.approx(2 * (5 + 9 + 20 + 1.8))
    assert plan.remaining(config, "inversion", 0, 10, 100.0, {}) is None, "nothing measured yet"
    seconds = {"inversion": 20.0, "drag": 27.0, "denoising": 20.0, "animation": 18.0}
    run: dict[str, Any] = {"model": "tiny", "device": "cpu", "config": settings}
    run["result"] = {"seconds": seconds, "losses": [0.0] * 4}
    measured = plan.rates([run], "tiny", "cpu")
    assert measured == pytest.approx({"inversion": 2, "drag": 3, "denoising": 1, "animation": 10})
    assert plan.expected(config, measured) == pytest.approx(20 + 27 + 20 + 18)
    assert plan.rates([run], "sd15", "cpu") == {} and plan.expected(config, {}) is None


def test_a_preview_is_near_the_truth() -> None:
    model = load_model("tiny")
    image = Image.open(ROOT / "minidrag/tiny/demo/ball.png").convert("RGB")
    other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with torch.no_grad():
        first, second = (model.vae.encode(images.to_tensor(one))[0] for one in (image, other))
    preview = LatentPreview(first, image, image.size)
    assert preview.preview(first).tobytes() == image.tobytes(), "nothing has changed yet"

    def error(shown: Image.Image) -> float:
        return (images.to_tensor(shown) - images.to_tensor(other)).square().mean().item()

    assert error(preview.preview(second)) < 0.5 * error(image)


# What goes wrong


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA out of memory. Tried"), "out of memory: try checkpointing"),
        (MemoryError(), "out of memory"),
        (FloatingPointError("drag: a number is not finite"), "try a smaller drag lr"),
        (OSError(28, "No space left on device", "edited.png"), "edited.png: No space left on device"),
        (ZeroDivisionError("x"), "a mistake in the program, ZeroDivisionError: x"),
    ],
)
def test_a_failed_edit_says_why_and_the_next_one_runs(
    client: Client, workdir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr("minidrag.app.session.drag_edit", raising(error))
    job = client.wait(start(client))
    assert job["state"] == "failed" and words in job["message"]
    assert {path.name for path in Path("runs").iterdir()} == {".page"}
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    assert client.wait(start(client))["state"] == "done"


def test_a_removed_folder_of_runs_ends_one_edit_only(
    client: Client, at_stage: Callable[[str, Callable[[], object]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_stage("animation", lambda: shutil.rmtree("runs", ignore_errors=True))
    job = client.wait(start(client))
    assert job["state"] == "failed" and "No such file or directory" in job["message"]
    assert client.get("/history") == []


def test_an_image_that_is_gone_is_named(client: Client, workdir: Path) -> None:
    upload = client.upload("/image", workdir / "photo.png")
    assert client.post("/check", client.options(image=upload["image"]))["error"] is None
    shutil.rmtree("runs/.page")
    answer = client.post("/submit", client.options(image=upload["image"]), status=400)
    assert answer["error"] == "the image is not here any more: open it again"
    client.wait(start(client))
    (workdir / "photo.png").write_bytes(b"other")
    assert client.ask("GET", "/run?name=photo-1")[0] == 400


def test_uploads_are_upright_and_the_same_pixels(client: Client, workdir: Path) -> None:
    image = Image.open("photo.png")
    image.save("turned.jpg", exif=turned(), quality=95)
    path = client.upload("/image", workdir / "turned.jpg")["image"]
    kept = pictures.load_image(Path(path))
    assert kept.size == (80, 96) and kept.tobytes() == pictures.load_image(Path("turned.jpg")).tobytes()
    status, headers, content = client.ask("GET", f"/image?name={path}")
    assert status == 200 and content == Path(path).read_bytes()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_a_run_of_another_place_is_matched_by_checksum(client: Client, workdir: Path) -> None:
    client.wait(start(client))
    values = json.loads(Path("runs/photo-1/run.json").read_text())
    moved = values | {"image": "/elsewhere/photo.png"}
    assert client.post("/match", moved)["image"] == str(workdir / "photo.png")
    unknown = moved | {"sha256": {"image": "0" * 64}}
    assert client.post("/match", unknown)["image"] is None
    client.post("/match", unknown | {"drags": [{"handle": [1, 2, 3], "target": "x"}]}, status=400)
    for wrong in ({"sha256": 3}, {"config": []}, {"unknown": 1}):
        client.post("/match", wrong, status=400)


def test_a_killed_program_loses_no_run(workdir: Path, untrained: Path) -> None:
    with serving(workdir / "photo.png", untrained) as client:
        client.wait(start(client))
        history = client.get("/history")
        asked = client.options(config=QUICK | {"drag_steps": 10**5, "tolerance": 0})
    process, other = outside(untrained)
    number = other.post("/submit", asked)["number"]
    until(lambda: other.job(number)["stage"] == "drag")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with serving(workdir / "photo.png", untrained) as client:
        assert client.get("/history") == history
        job = client.job(number)
        assert job["state"] == "interrupted" and job["values"] == asked
        client.post("/stop", {"number": number})
        assert client.wait(start(client))["state"] == "done"
    assert not [*Path("runs/.page").glob("job-*")]


def test_a_folder_that_turns_into_a_file_ends_no_queue(client: Client, workdir: Path) -> None:
    until(lambda: client.get("/state")["model"])
    shutil.rmtree("runs", ignore_errors=True)
    number = start(client)
    client.wait(number)
    shutil.rmtree("runs/.page")
    Path("runs/.page").write_text("")
    asked = client.options()
    client.post("/submit", asked, status=507)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.site.store, "write_json", lambda name, values: Path(name))
        assert client.wait(start(client))["state"] == "done"
        assert client.wait(start(client))["state"] == "done", "the queue goes on"


def test_a_program_that_cannot_start_says_why(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "minidrag.page.engine.Engine.__init__", raising(OSError(13, "Permission denied", "runs"))
    )
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["--page", "photo.png", "--no-browser", "--port", "0"]) == 2
    assert capsys.readouterr().err == "minidrag: runs: Permission denied\n"


def test_ctrl_c_ends_the_program_cleanly(workdir: Path, untrained: Path) -> None:
    process, other = outside(untrained)
    assert other.get("/settings")["models"] == [str(untrained), "sd15", "tiny"]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and said == ""


def test_an_impatient_second_ctrl_c_ends_it_at_once(workdir: Path, untrained: Path) -> None:
    process, other = outside(untrained)
    assert process.stdout
    asked = {"image": str(workdir / "photo.png"), "drags": [{"handle": [30, 40], "target": [48, 42]}]}
    settings = other.get("/settings")
    asked |= {"model": str(untrained), "config": QUICK | {"lora_steps": 10**6}, **settings["fixed"]}
    number = other.post("/submit", asked)["number"]
    until(lambda: other.job(number)["stage"] == "LoRA")
    process.send_signal(signal.SIGINT)
    while (line := process.stdout.readline()) != "stopping\n":
        assert line, "the program ended"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def outside(model: Path) -> tuple[subprocess.Popen[str], Client]:
    """The program in a process of its own, and a client of it."""
    command = [sys.executable, str(ROOT / "demo.py"), "--page", "photo.png", "--no-browser", "--port", "0"]
    command += ["--model", str(model), "--device", "cpu"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by tests in the background
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    return process, Outside(process)


class Outside(Client):
    """A client of a server in another process."""

    def __init__(self, process: subprocess.Popen[str]):
        assert process.stdout
        address = process.stdout.readline().split()[-1]
        place, _, token = address.partition("/?token=")
        self.port = int(place.rpartition(":")[2])
        self.site: Any = type("Named", (), {"cookie": f"minidrag-{self.port}", "token": token})
