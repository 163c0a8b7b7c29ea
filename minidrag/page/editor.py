"""Edits of the page: what demo.py does, with a model that stays, and with what a stopped edit leaves."""

import json
import re
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minidrag.app import advice, results
from minidrag.app.options import Options, open_input, open_model
from minidrag.app.session import Session, generate_image, open_session
from minidrag.method.drag import Step
from minidrag.method.progress import Progress
from minidrag.model import Model
from minidrag.page.job import Job, Stopped
from minidrag.page.preview import LatentPreview
from minidrag.points import Pixel, to_pixels
from minidrag.system import console

PREVIEW_EVERY = 0.25  # seconds
MAX_PREVIEW = 1024  # pixels, the longer side of a preview


class Editor:
    """Holds the model; only one thread may run jobs."""

    def __init__(self):
        self.model: Model | None = None
        self.name = ""  # of the model
        self.ready: set[str] = set()  # keys of LoRAs that are in the cache

    def run(self, job: Job) -> None:
        """Run a job and record how it ended. No error stops the queue."""
        try:
            if job.kind == "edit":
                self.edit(job)
            else:
                self.warm(job)
            job.state = "stopped" if job.message else "done"
        except Stopped:
            job.message = "stopped before anything was dragged"
            job.state = "stopped"
        except Exception as error:
            job.message = explain(error)
            job.state = "failed"
            print(f"minidrag: {job.message}", file=sys.stderr)
        job.steps = []  # the latents of a long drag are large

    def prepare(self, options: Options, progress: Progress | None = None) -> Session | None:
        """Return an edit that is about to start, or as much of it as its LoRA needs while it has no drags.

        None before its model is loaded, and while nothing tells its window. Raises ValueError for an edit
        that cannot start.
        """
        if not options.drags:
            options = replace(options, drags=[(Pixel(0, 0), Pixel(0, 0))], mask=None)
            if options.config.window:
                return None
        image, mask = open_input(options)
        if self.model is None or self.name != options.model:
            return None
        return Session(self.model, options, image, mask, progress or Progress())

    def load(self, job: Job) -> Model:
        """Return the model of a job; the previous one stays until the new one is complete."""
        job.enter("model")
        with job.timed("model"):
            if self.model is None or self.name != job.options.model:
                self.model = open_model(job.options)
                self.name = job.options.model
        return self.model

    def warm(self, job: Job) -> None:
        """Load the model of a job and, unless that is all, train its LoRA."""
        self.load(job)
        if job.kind == "train" and (session := self.prepare(job.options, job)):
            self.find_lora(session)

    def find_lora(self, session: Session) -> None:
        session.find_lora()
        self.ready.add(lora_key(session))

    def edit(self, job: Job) -> None:
        """Edit and write the results, as demo.py does; if stopped, write the latest preview.

        Raises Stopped for a job that was stopped before its drag began.
        """
        options = job.options
        with results.output(None, options.image or Path("generated")) as folder:
            model = self.load(job)
            generated = None
            if options.image is None:
                generated = generate_image(model, options, job)
                generated[0].save(folder / "generated.png")
            if options.drags:
                session = open_session(model, options, job, generated)
                job.notes = [in_words(note) for note in advice.before(session)]
                self.find_lora(session)
                drag(folder, session, job)
        job.run = folder.parent.name


def drag(folder: Path, session: Session, job: Job) -> None:
    """Drag the image of a job, which has its LoRA, and write the results."""
    config = job.options.config
    watch(job, LatentPreview(session.latent, session.part, session.size), session)
    try:
        edit = session.edit()
    except Stopped:
        if not job.steps:
            raise
        results.write(folder, session, session.partial_edit(job.steps), stop_message(job))
        return
    if session.mask is not None and config.keep_background:
        edit.raw.save(folder / "raw.png")
    missing = results.write(folder, session, edit)
    if any(isinstance(error, Stopped) for error in missing.values()):
        results.record(folder / "run.json", session, edit, stop_message(job))
    notes = [*advice.after(session, edit), *advice.about_missing(missing)]
    job.notes = [in_words(note) for note in notes]


def describe(session: Session) -> dict[str, Any]:
    """Notes on an edit before it runs, its window, its LoRA, and the drags that its mask cuts."""
    return {
        "notes": [in_words(note) for note in advice.before(session)],
        "window": None if session.window.size == session.image.size else session.window,
        "scale": advice.scale(session),
        "lora": lora_key(session),
        "cut": [*advice.cut_targets(session)],
        "cell": advice.cell(session),
    }


def lora_key(session: Session) -> str:
    """Everything that decides the LoRA of an edit."""
    options = session.options
    settings = {k: v for k, v in asdict(options.config).items() if k.startswith("lora_") or k == "size"}
    return json.dumps(
        [str(options.image), options.prompt, options.model, options.seed, settings, session.window]
    )


def stop_message(job: Job) -> str:
    job.message = f"stopped at {job.stage} {job.done} of {job.total}: this is the edit so far"
    return job.message


def watch(job: Job, preview: LatentPreview, session: Session) -> None:
    """Note the handles of each step of a job, in pixels of the image, and now and then a preview."""
    job.paths = [[] for _ in job.options.drags]
    window = session.window

    def on_step(step: Step) -> None:
        handles = window.leave(to_pixels(step.handles, window.size, session.task.grid))
        for path, handle in zip(job.paths, handles, strict=True):
            path.append(handle)
        now = time.perf_counter()
        if job.preview is None or now - job.preview_time >= PREVIEW_EVERY:
            job.preview = window.insert(preview.preview(step.predicted), session.image)
            job.preview.thumbnail((MAX_PREVIEW, MAX_PREVIEW))
            job.preview_time = now
            job.previews += 1

    job.on_step = on_step


def in_words(sentence: str) -> str:
    """A sentence for the command line without the names of its options; a command in it stays as it is."""
    plain, *rest = sentence.split("`", 2)
    if len(rest) == 2:
        return f"{in_words(plain)}`{rest[0]}`{in_words(rest[1])}"
    sentence = re.sub(r" \(--[^)]*\)", "", sentence)
    named = {"mask": "the mask", "prompt": "the prompt"}
    return re.sub(r"--([a-z-]+)", lambda option: named.get(option[1], option[1].replace("-", " ")), sentence)


def explain(error: Exception) -> str:
    """One sentence on why a job failed; a mistake in the program also prints its traceback."""
    if console.is_out_of_memory(error):
        return "out of memory: try checkpointing, a LoRA batch of 1, or a smaller size"
    text = in_words(" ".join(console.reason(error).split()))
    if isinstance(error, FloatingPointError):
        return f"{text}: try a smaller drag lr or lora lr"
    if isinstance(error, (ValueError, OSError, SafetensorError)):
        return text
    traceback.print_exception(error)
    return f"a mistake in the program, {type(error).__name__}: {text}"
