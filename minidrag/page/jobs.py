"""The queue of the page: one edit at a time, and between edits the LoRA that the next one will need."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from minidrag.app import advice
from minidrag.app.options import open_input
from minidrag.edit import prepare
from minidrag.page import times
from minidrag.page.editor import Editor, in_words
from minidrag.page.history import read_json
from minidrag.page.job import Job, key
from minidrag.page.store import Store
from minidrag.page.terms import PRESETS, Terms, without_drags
from minidrag.page.worker import Worker

KEPT = 20  # jobs that are over and still shown


class Queue:
    """Jobs of every tab, in order. Its methods may be called from any thread.

    Raises ValueError for a device that does not exist.
    """

    def __init__(self, store: Store, model: str, fixed: dict[str, str | None]):
        self.store, self.terms = store, Terms(store, model, fixed)
        self.editor, self.change, self.closed = Editor(), threading.Condition(), False
        self.jobs: list[Job] = []
        self.ahead: Job | None = None  # the LoRA that the page will need
        self.worker = Worker(self)
        for path in sorted(store.place.glob("job-*.json"), key=lambda path: path.stat().st_mtime):
            restore(self, path)

    def next(self) -> Job | None:
        waiting = [job for job in (*self.jobs, self.ahead) if job and job.state == "waiting"]
        return waiting[0] if waiting and not self.closed else None

    def submit(self, values: Any) -> Job:
        """Put an edit into the queue; a LoRA in training that it does not need makes way."""
        asked = self.terms.parse(values)
        if asked.image:
            open_input(asked)
        with self.change:
            job = Job(max([0, *(job.number for job in self.jobs)]) + 1, asked, values)
            self.store.write_json(f"job-{job.number}.json", values)
            over = [job for job in self.jobs if job.state not in ("waiting", "running")]
            self.jobs = [*(job for job in self.jobs if job not in over[:-KEPT]), job]
            if self.ahead and self.ahead.kind == "learn" and key(self.ahead.options) != key(asked):
                self.ahead.stop = True
            self.change.notify_all()
        return job

    def prepare(self, values: Any, kind: str = "learn") -> None:
        """Train the LoRA of these options when nothing else is to be done, instead of another's."""
        asked = self.terms.parse(without_drags(values))
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
            job = {job.number: job for job in (*self.jobs, self.ahead) if job}[number]
            job.stop = True
            if job.state in ("waiting", "interrupted"):
                job.state, job.message = "stopped", "cancelled"
                if job.kind == "edit":
                    self.forget(job)

    def close(self) -> bool:
        """Stop what is running, which may take a step; return True once it has ended."""
        with self.change:
            self.closed = True
            for job in (*self.jobs, self.ahead):
                if job:
                    job.stop = True
            self.change.notify_all()
        self.worker.join(60)
        return not self.worker.is_alive()

    def forget(self, job: Job) -> None:
        with suppress(OSError):  # the folder was removed, or cannot be written any more
            (self.store.place / f"job-{job.number}.json").unlink(missing_ok=True)


def restore(queue: Queue, path: Path) -> None:
    """Take up a job that the program was ended in, to be run again or dropped."""
    told: Any = {
        "state": "interrupted",
        "message": "the program ended while this edit was waiting or running",
    }
    try:
        number, values = int(path.stem.removeprefix("job-")), read_json(path)
        queue.jobs.append(Job(number, queue.terms.parse(values), values, **told))
    except ValueError:  # its picture is gone
        with suppress(OSError):
            path.unlink()


def check(queue: Queue, values: Any) -> dict[str, Any]:
    """Return notes on an edit before it runs, its seconds by preset, and whether its LoRA is cached."""
    asked = queue.terms.parse(without_drags(values))
    found: dict[str, Any] = {"notes": [], "error": None, "ready": key(asked) in queue.editor.ready}
    model = queue.editor.model
    try:
        image, mask = open_input(asked)
        if model and queue.editor.name == asked.model:
            prepare(model, image.size, asked.handles, asked.targets, mask, asked.config)
            found["notes"] = [in_words(note) for note in advice.before(model, image, mask, asked)]
    except ValueError as error:
        found["error"] = in_words(str(error))
    rates = queue.terms.rates(asked)
    seconds = {name: times.expected(config, rates) for name, config in PRESETS.items()}
    skip = ("LoRA",) if found["ready"] else ()
    return found | {"seconds": seconds | {"now": times.expected(asked.config, rates, skip)}}


def report(queue: Queue) -> dict[str, Any]:
    """State of the queue, as JSON."""
    editor, ahead = queue.editor, queue.ahead
    found: dict[str, Any] = {"model": editor.name, "jobs": [], "ahead": None}
    for job in queue.jobs:
        found["jobs"].append(job.report(queue.terms.rates(job.options) if job.state == "running" else {}))
    if ahead:
        found["ahead"] = ahead.report({}) | {"values": ahead.values}
    return found
