"""A job of the page: its progress, its results, and whether someone stopped it."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image

from minidrag.app.options import Options
from minidrag.method.drag import Step
from minidrag.method.progress import Progress, is_work
from minidrag.page import plan
from minidrag.points import Pixel

T = TypeVar("T")
REPORTED = ("number", "kind", "lora", "state", "stage", "done", "total", "paths", "notes", "message")
REPORTED += ("run", "values")


class Stopped(Exception):
    """Someone stopped the job."""


@dataclass
class Job(Progress):
    """An edit, or the training of its LoRA ahead. As a `Progress` it notes each step, and ends at a stop."""

    number: int
    options: Options
    values: dict[str, Any]  # the options as the page sent them
    kind: str = "edit"  # or "train": only the LoRA; "load": only the model
    lora: str = ""  # as by `lora_key`; empty if unknown
    state: str = "waiting"  # running, done, stopped, failed; interrupted: the program ended
    stage: str = ""
    done: int = 0  # steps of the stage
    total: int = 0
    paths: list[list[Pixel]] = field(default_factory=list)  # of each handle, by update of the drag
    steps: list[Step] = field(default_factory=list)  # of the drag
    notes: list[str] = field(default_factory=list)
    message: str = ""
    run: str = ""  # folder of the results
    preview: Image.Image | None = None
    previews: int = 0  # number of previews so far
    preview_time: float = 0.0
    stop: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = 0.0  # of the stage
    on_step: Callable[[Step], None] | None = None
    show: bool = False

    def __call__(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        self.enter(name, total)
        for item in super().__call__(name, items, total):
            self.done += is_work(item)
            if isinstance(item, Step):
                self.steps.append(item)
                if self.on_step:
                    self.on_step(item)
            self.check()
            yield item

    def enter(self, stage: str, total: int = 0) -> None:
        self.stage = stage
        self.done = 0
        self.total = total
        self.began = time.perf_counter()
        self.check()

    def check(self) -> None:
        if self.stop:
            raise Stopped

    def report(self, rates: dict[str, float]) -> dict[str, Any]:
        """Return the progress and the options of this job, for the page."""
        report = {name: getattr(self, name) for name in REPORTED}
        report |= {"stopping": self.stop, "previews": self.previews, "seconds_left": None}
        if self.state == "running":
            steps = self.stage, self.done, self.total, self.began
            report["seconds_left"] = plan.remaining(self.options.config, *steps, rates)
        return report
