"""A job of the page: where it is, what was seen of it, and whether someone stopped it."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from PIL import Image

from minidrag.app.options import Options
from minidrag.method.drag import Step
from minidrag.method.progress import Progress
from minidrag.page import times
from minidrag.points import Pixel

T = TypeVar("T")
SHOWN = ("number", "kind", "state", "stage", "done", "total", "paths", "notes", "message", "run")


class Stopped(Exception):
    """Someone stopped the job."""


@dataclass
class Job(Progress):
    """An edit, or the training of its LoRA ahead. As a `Progress` it notes each step, and ends at a stop."""

    number: int
    options: Options
    values: dict[str, Any]  # the options as the page sent them
    kind: str = "edit"  # or "learn": only the LoRA; "load": only the model
    state: str = "waiting"  # running, done, stopped, failed; interrupted: the program was ended
    stage: str = ""
    done: int = 0  # steps of the stage
    total: int = 0
    paths: list[list[Pixel]] = field(default_factory=list)  # of each handle, by step of the drag
    steps: list[Step] = field(default_factory=list)  # of the drag
    notes: list[str] = field(default_factory=list)
    message: str = ""
    run: str = ""  # folder with the results
    picture: Image.Image | None = None  # what the UNet foresees
    pictures: int = 0  # so many were foreseen
    stop: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = 0.0
    began: float = 0.0  # of the stage
    seen: float = 0.0  # time of the last picture
    see: Callable[[Step], None] | None = None
    show: bool = False

    def __call__(self, name: str, items: Iterable[T], total: int) -> Iterator[T]:
        self.enter(name, total)
        for item in super().__call__(name, items, total):
            self.done += 1
            if isinstance(item, Step):
                self.steps.append(item)
                if self.see:
                    self.see(item)
            self.check()
            yield item

    def enter(self, stage: str, total: int = 0) -> None:
        self.stage, self.done, self.total, self.began = stage, 0, total, time.perf_counter()
        self.check()

    def check(self) -> None:
        if self.stop:
            raise Stopped

    def report(self, rates: dict[str, float]) -> dict[str, Any]:
        """Return the progress and the options of this job, for the page."""
        shown: dict[str, Any] = {name: getattr(self, name) for name in SHOWN}
        shown |= {"left": None, "stopping": self.stop, "pictures": self.pictures}
        if self.state == "running":
            at = self.stage, self.done, self.total, self.began
            shown["left"] = times.left(self.options.config, *at, rates)
        return shown | {"values": self.values}


def key(options: Options) -> tuple[Any, ...]:
    """Everything that decides a LoRA."""
    settings = {k: v for k, v in asdict(options.config).items() if k.startswith("lora_") or k == "size"}
    return options.image, options.prompt, options.model, options.seed, *settings.items()
