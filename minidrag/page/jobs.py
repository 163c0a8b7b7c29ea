"""The queue of the page: one edit at a time, and between edits the LoRA that the next one will need."""

import threading
from contextlib import suppress
from typing import Any

from minidrag.app.options import Options
from minidrag.page.job import Job
from minidrag.page.store import Store

MOST = 20  # jobs that are over and still listed


class Queue:
    """Jobs of every tab, in order. Its methods may be called from any thread."""

    def __init__(self, store: Store, jobs: list[Job]):
        self.store = store
        self.jobs = jobs
        self.ahead: Job | None = None  # trains the LoRA, or loads the model, that the page will need
        self.change = threading.Condition()
        self.closed = False

    def take(self) -> Job | None:
        """Wait for a job, and mark it as running; None once the queue is closed."""
        with self.change:
            while not self.closed:
                for job in (*self.jobs, self.ahead):
                    if job and job.state == "waiting":
                        job.state = "running"
                        return job
                self.change.wait()
        return None

    def put(self, options: Options, values: Any, lora: str) -> Job:
        """Add an edit; a LoRA in training that it does not need makes way.

        values: the options as JSON. lora: key of the LoRA that it needs.
        """
        with self.change:
            job = Job(max([0, *(job.number for job in self.jobs)]) + 1, options, values, lora=lora)
            self.store.write_json(f"job-{job.number}.json", values)
            over = [job for job in self.jobs if job.state not in ("waiting", "running")]
            self.jobs = [*(job for job in self.jobs if job not in over[:-MOST]), job]
            ahead = self.ahead
            if ahead and ahead.kind == "train" and ahead.lora != lora:
                ahead.stop = True
            self.change.notify_all()
        return job

    def prefetch(self, options: Options, kind: str, lora: str = "") -> None:
        """Train a LoRA while no edit waits, or load only a model, instead of another one."""
        with self.change:
            ahead = self.ahead
            work = kind, lora, options.model
            if ahead and not ahead.stop and (ahead.kind, ahead.lora, ahead.options.model) == work:
                return
            if ahead:
                ahead.stop = True
            self.ahead = Job(0, options, {}, kind=kind, lora=lora)
            self.change.notify_all()

    def stop(self, number: int) -> None:
        """Stop a job, waiting or running; 0: the LoRA that is trained ahead. KeyError if there is none."""
        with self.change:
            job = {job.number: job for job in (*self.jobs, self.ahead) if job}[number]
            job.stop = True
            if job.state in ("waiting", "interrupted"):
                job.state = "stopped"
                job.message = "cancelled"
                self.forget(job)

    def close(self) -> None:
        """Stop the job that is running, and give out no other."""
        with self.change:
            self.closed = True
            for job in (*self.jobs, self.ahead):
                if job:
                    job.stop = True
            self.change.notify_all()

    def forget(self, job: Job) -> None:
        """Remove the file by which a later start of the program would offer the job again."""
        with suppress(OSError):  # the folder was removed, or cannot be written any more
            (self.store.folder / f"job-{job.number}.json").unlink(missing_ok=True)
