"""The queue of the page: one edit at a time, and between edits the LoRA that the next one will need."""

import json
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minidrag import console
from minidrag.app import advice, options
from minidrag.app.options import CONFIG_HELP, CONFIGS, HELP, Options, open_input
from minidrag.config import BOUNDS, CHOICES, EditConfig
from minidrag.page import times
from minidrag.page.editor import Editor, in_words
from minidrag.page.job import Job, Stopped, key
from minidrag.page.store import Store, read_json
from minidrag.points import to_task

PRESETS = {"default": EditConfig()} | {name: CONFIGS[name] for name in sorted(CONFIGS)}
DEFAULT_HELP = "things moved, then dragged; with a LoRA"
NOWHERE = {"handle": [0, 0], "target": [0, 0]}  # a drag, for options that need one
KEPT = 20  # jobs that are over and still shown


class Queue(threading.Thread):
    """Jobs of every tab, in order. Its methods may be called from any thread; the editor is its own.

    fixed: what the command line decided, by key of the options' JSON. Raises ValueError for a device that
    does not exist.
    """

    def __init__(self, store: Store, model: str, fixed: dict[str, str | None]):
        super().__init__(daemon=True)
        device, dtype = options.choose_device(fixed["device"], fixed["dtype"])
        self.store, self.fixed = store, fixed | {"lora": None, "device": device, "dtype": dtype}
        self.models = list(dict.fromkeys([model, *options.NAMED]))
        self.editor, self.change, self.closed = Editor(), threading.Condition(), False
        self.jobs: list[Job] = []
        self.ahead: Job | None = None  # the LoRA that the page will need
        for path in sorted(store.place.glob("job-*.json"), key=lambda path: path.stat().st_mtime):
            self.restore(path)

    def run(self) -> None:
        while True:
            with self.change:
                while not (job := self.next()):
                    if self.closed:
                        return
                    self.change.wait()
                job.state = "running"
            self.work(job)

    def next(self) -> Job | None:
        waiting = [job for job in (*self.jobs, self.ahead) if job and job.state == "waiting"]
        return waiting[0] if waiting and not self.closed else None

    def work(self, job: Job) -> None:
        """Do a job. Whatever happens, the queue goes on, and the job says it in one sentence."""
        try:
            self.editor.do(job)
            job.state = "stopped" if job.message else "done"
        except Stopped:
            job.state, job.message = "stopped", "stopped before anything was dragged"
        except Exception as error:
            job.state, job.message = "failed", explain(error)
            print(f"minidrag: {job.message}", file=sys.stderr)
        job.steps = []  # the latents of a long drag are large
        if job.kind == "edit" and not self.closed:
            self.forget(job)

    def submit(self, values: Any) -> Job:
        """Put an edit into the queue; a LoRA in training that it does not need makes way."""
        asked = self.parse(values)
        if asked.image:
            open_input(asked)
        with self.change:
            job = Job(max([0, *(job.number for job in self.jobs)]) + 1, asked, values)
            self.store.write_json(self.file(job).name, values)
            over = [job for job in self.jobs if job.state not in ("waiting", "running")]
            self.jobs = [*(job for job in self.jobs if job not in over[:-KEPT]), job]
            if self.ahead and self.ahead.kind == "learn" and key(self.ahead.options) != key(asked):
                self.ahead.stop = True
            self.change.notify_all()
        return job

    def prepare(self, values: Any, kind: str = "learn") -> None:
        """Train the LoRA of these options when nothing else is to be done, in place of another's."""
        asked = self.parse(without_drags(values))
        with self.change:
            before = self.ahead
            same = before and before.kind == kind and key(before.options) == key(asked)
            if before and same and before.state in ("waiting", "running", "done"):
                return
            if before:
                before.stop, before.state = True, "stopped" if before.state == "waiting" else before.state
            self.ahead = Job(0, asked, {}, kind=kind)
            self.change.notify_all()

    def stop(self, number: Any) -> None:
        """Stop a job, waiting or running; 0: the LoRA that is trained ahead. KeyError if there is none."""
        with self.change:
            jobs = {job.number: job for job in (*self.jobs, self.ahead) if job}
            job = jobs[number]
            job.stop = True
            if job.state in ("waiting", "interrupted"):
                job.state, job.message = "stopped", "cancelled"
                if job.kind == "edit":
                    self.forget(job)

    def close(self) -> None:
        """Stop what is running; it may take a step."""
        with self.change:
            self.closed = True
            for job in (*self.jobs, self.ahead):
                if job:
                    job.stop = True
            self.change.notify_all()
        self.join(60)

    def restore(self, path: Path) -> None:
        """Take up a job that the program was ended in, to be run again or dropped."""
        try:
            number, values = int(path.stem.removeprefix("job-")), read_json(path)
            job = Job(number, self.parse(values), values, state="interrupted")
        except ValueError:
            with suppress(OSError):
                path.unlink()  # its picture is gone
            return
        job.message = "the program ended while this edit was waiting or running"
        self.jobs.append(job)

    def forget(self, job: Job) -> None:
        with suppress(OSError):  # the folder was removed, or cannot be written any more
            self.file(job).unlink(missing_ok=True)

    def file(self, job: Job) -> Path:
        return self.store.place / f"job-{job.number}.json"

    def parse(self, values: Any) -> Options:
        """Options from their JSON, as `demo.py --from` reads it; ValueError for what a page may not ask."""
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        known = self.store.known()
        for name in ("image", "mask"):
            if values.get(name) is not None and str(values[name]) not in known:
                raise ValueError(f"the {name} is not here any more: open it again")
        if values.get("model") not in self.models:
            raise ValueError(f"the model must be one of {', '.join(self.models)}")
        for name, own in self.fixed.items():
            if values.get(name) != own:
                raise ValueError(f"{name} must be {own}, as the command line said")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.json"
            file.write_text(json.dumps(values), encoding="utf-8")
            try:
                return options.read_options({"base": file})
            except ValueError as error:
                said = str(error).replace(f"{file}: ", "").replace(str(file), "the request")
                raise ValueError(said) from None

    def check(self, values: Any) -> dict[str, Any]:
        """Return notes on an edit before it runs, its seconds by preset, and whether its LoRA is cached."""
        asked = self.parse(without_drags(values))
        found: dict[str, Any] = {"notes": [], "error": None, "ready": key(asked) in self.editor.ready}
        model = self.editor.model
        try:
            image, mask = open_input(asked)
            if model and self.editor.name == asked.model:
                to_task(model, image.size, asked.handles, asked.targets, mask, asked.config)
                found["notes"] = [in_words(note) for note in advice.before(model, image, mask, asked)]
        except ValueError as error:
            found["error"] = in_words(str(error))
        rates = self.rates(asked)
        seconds = {name: times.expected(config, rates) for name, config in PRESETS.items()}
        skip = ("LoRA",) if found["ready"] else ()
        return found | {"seconds": seconds | {"now": times.expected(asked.config, rates, skip)}}

    def rates(self, asked: Options) -> dict[str, float]:
        past = sorted(self.store.runs().values(), key=lambda values: values["time"])
        return times.rates(past, asked.model, str(asked.device))

    def report(self) -> dict[str, Any]:
        """State of the queue, as JSON."""
        editor, ahead = self.editor, self.ahead
        found: dict[str, Any] = {"model": editor.name, "jobs": [], "ahead": None}
        for job in self.jobs:
            found["jobs"].append(job.report(self.rates(job.options) if job.state == "running" else {}))
        if ahead:
            found["ahead"] = ahead.report({}) | {"values": ahead.values}
        return found


def without_drags(values: Any) -> Any:
    """Options that may still lack drags, with one that goes nowhere."""
    return values | {"drags": [NOWHERE]} if isinstance(values, dict) and not values.get("drags") else values


def settings(queue: Queue) -> dict[str, Any]:
    """Everything that the page makes its form from: fields of EditConfig, presets, models."""
    found = []
    for entry in fields(EditConfig):
        least, most = BOUNDS.get(entry.name, (None, None))
        kind = {bool: "bool", str: "str", float: "float"}.get(entry.type, "int")  # type: ignore[arg-type]
        about = {"name": entry.name, "help": HELP[entry.name], "kind": kind, "least": least, "most": most}
        found.append(about | {"choices": CHOICES.get(entry.name), "optional": entry.default is None})
    presets = {name: asdict(config) for name, config in PRESETS.items()}
    parts = [part.partition(": ") for part in CONFIG_HELP.split("; ")]
    abouts = {"default": DEFAULT_HELP} | {name: text for name, _, text in parts}
    names = {"models": queue.models, "fixed": queue.fixed}
    return {"fields": found, "presets": presets, "abouts": abouts, **names}


def explain(error: Exception) -> str:
    """One sentence on why a job failed; a mistake in the program also shows its traceback in the terminal."""
    text = in_words(" ".join(str(error).split()))
    if console.is_out_of_memory(error):
        return "out of memory: try checkpointing, a LoRA batch of 1, or a smaller size"
    if isinstance(error, FloatingPointError):
        return f"{text}: try a smaller drag lr or lora lr"
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return in_words(" ".join(console.reason(error).split()))
    traceback.print_exception(error)
    return f"a mistake in the program, {type(error).__name__}: {text}"
