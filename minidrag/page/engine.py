"""The part of the page that needs PyTorch: it checks requests, and runs the jobs in a thread."""

import threading
from contextlib import suppress
from typing import Any

from minidrag.app.options import Options
from minidrag.page import plan
from minidrag.page.editor import Editor, describe, in_words, lora_key
from minidrag.page.history import read_json
from minidrag.page.inputs import Inputs
from minidrag.page.job import Job
from minidrag.page.jobs import Queue
from minidrag.page.store import Store
from minidrag.page.validation import PRESETS, Validator

INTERRUPTED = "the program ended while this edit was waiting or running"


class Engine:
    """Everything that works on the images of one store.

    fixed: options of the command line, by name. Raises ValueError for a device that does not exist.
    """

    def __init__(self, store: Store, model: str, fixed: dict[str, str | None]):
        self.store = store
        self.validator = Validator(store, model, fixed)
        self.inputs = Inputs(store)
        self.editor = Editor()
        self.queue = Queue(store, restore(store, self.validator))
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        """Run the jobs, one at a time, until the queue is closed."""
        while job := self.queue.take():
            self.editor.run(job)
            if not self.queue.closed:  # else the job is offered again at the next start
                self.queue.forget(job)

    def submit(self, values: Any) -> int:
        """Add an edit to the queue; return its number."""
        options = self.validator.parse(values)
        session = self.editor.prepare(options) if options.image else None  # refused before it waits
        return self.queue.put(options, values, lora_key(session) if session else "").number

    def prefetch(self, values: Any) -> None:
        """Train the LoRA that an edit will need while none waits; first load its model."""
        options = self.validator.parse(values, without_drags=True)
        if self.editor.name != options.model:
            self.queue.prefetch(options, "load")
            return
        with suppress(ValueError):  # `check` says why the edit cannot start
            session = self.editor.prepare(options)
            if session and (lora := lora_key(session)) not in self.editor.ready:
                self.queue.prefetch(options, "train", lora)

    def check(self, values: Any) -> dict[str, Any]:
        """Describe an edit before it runs, with its seconds by preset, and whether its LoRA is cached."""
        options = self.validator.parse(values, without_drags=True)
        report: dict[str, Any] = {"notes": [], "error": None, "lora": ""}
        try:
            if session := self.editor.prepare(options):
                report |= describe(session)
        except ValueError as error:
            report["error"] = in_words(str(error))
        report["ready"] = report["lora"] in self.editor.ready
        rates = self.rates(options)
        skip = ("LoRA",) if report["ready"] else ()
        report["seconds"] = {name: plan.expected(config, rates) for name, config in PRESETS.items()}
        report["seconds"]["now"] = plan.expected(options.config, rates, skip)
        return report

    def state(self) -> dict[str, Any]:
        """State of the jobs, as JSON."""
        jobs = [job.report(self.rates(job.options)) for job in self.queue.jobs]
        ahead = self.queue.ahead
        return {"model": self.editor.name, "jobs": jobs, "prefetch": ahead and ahead.report({})}

    def rates(self, options: Options) -> dict[str, float]:
        """Seconds per unit of work on this machine, by stage, with the model of these options."""
        past = sorted(self.store.history.runs().values(), key=lambda run: run["time"])
        return plan.rates(past, options.model, str(options.device))

    def close(self) -> bool:
        """Stop what is running, which may take a step; return True once it has ended."""
        self.queue.close()
        self.thread.join(60)
        return not self.thread.is_alive()


def restore(store: Store, validator: Validator) -> list[Job]:
    """Jobs that the program was ended in, to be run again or dropped."""
    jobs = []
    for path in sorted(store.folder.glob("job-*.json"), key=lambda path: path.stat().st_mtime):
        try:
            number = int(path.stem.removeprefix("job-"))
            values = read_json(path)
            job = Job(number, validator.parse(values), values, state="interrupted", message=INTERRUPTED)
            jobs.append(job)
        except ValueError:  # its image is gone
            with suppress(OSError):
                path.unlink()
    return jobs
