"""Edits of the page: what demo.py does, with a model that stays, and with what a stopped edit leaves."""

import json
import math
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from minidrag import images
from minidrag.app import advice, lora_cache, runs
from minidrag.app.options import Options, open_input, open_model, to_json
from minidrag.edit import drag_edit, prepare
from minidrag.method.drag import Step
from minidrag.method.lora import LoRA
from minidrag.model import Model, decode
from minidrag.page.job import Job, Stopped, lora_key
from minidrag.page.preview import LatentPreview
from minidrag.points import Pixel, to_pixels
from minidrag.system import console
from minidrag.weights import lora_file

PREVIEW_EVERY = 0.25  # seconds


class Editor:
    """Holds the model; only one thread may run jobs."""

    def __init__(self):
        self.model: Model | None = None
        self.name = ""  # of the model
        self.ready: set[tuple[Any, ...]] = set()  # LoRAs that are in the cache

    def run(self, job: Job) -> None:
        """Run a job and record how it ended. No error stops the queue."""
        job.started = time.perf_counter()
        try:
            if job.kind == "edit":
                self.edit(job)
            else:
                self.warm(job)
            job.state = "stopped" if job.message else "done"
        except Stopped:
            job.state = "stopped"
            job.message = "stopped before anything was dragged"
        except Exception as error:
            job.state = "failed"
            job.message = explain(error)
            print(f"minidrag: {job.message}", file=sys.stderr)
        job.steps = []  # the latents of a long drag are large

    def check(self, options: Options) -> list[str]:
        """Notes on an edit that is about to start; ValueError for one that cannot."""
        image, mask = open_input(options)
        if self.model is None or self.name != options.model:
            return []
        prepare(self.model, image.size, options.handles, options.targets, mask, options.config)
        return [in_words(note) for note in advice.before(self.model, image, mask, options)]

    def is_ready(self, options: Options) -> bool:
        """True if the LoRA of these options is in the cache."""
        return lora_key(options) in self.ready

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
        model = self.load(job)
        if job.kind == "train":
            self.find_lora(model, open_input(job.options)[0], job)

    def find_lora(self, model: Model, image: Image.Image, job: Job) -> LoRA:
        """Return the LoRA of a job, trained unless it is in the cache."""
        options = job.options
        lora, _ = lora_cache.find_lora(model, image, options.prompt, options.config, options.seed, job)
        self.ready.add(lora_key(options))
        return lora

    def edit(self, job: Job) -> None:
        """Edit and write the results, as demo.py does; if stopped, write the latest preview.

        Raises Stopped for a job that was stopped before its drag began.
        """
        options = job.options
        with runs.output(None, options.image or Path("generated")) as folder:
            model = self.load(job)
            clean = None
            if options.image is None:
                image, clean = runs.generate_image(model, options, job)
                image.save(folder / "generated.png")
            if options.drags:
                self.drag(folder, model, job, clean)
        job.run = folder.parent.name

    def drag(self, folder: Path, model: Model, job: Job, clean: Tensor | None) -> None:
        """Drag the image of a job; clean: its latent, if it was generated."""
        options = job.options
        config = options.config
        image, mask = open_input(options, folder / "generated.png")
        drags = options.handles, options.targets
        grid = prepare(model, image.size, *drags, mask, config).grid  # before the long training
        job.notes = [in_words(note) for note in advice.before(model, image, mask, options)]
        lora = self.find_lora(model, image, job)
        watch(job, LatentPreview(model, image, config), image.size, grid)
        try:
            edit = drag_edit(
                model,
                image,
                *drags,
                mask=mask,
                prompt=options.prompt,
                config=config,
                lora=lora,
                clean=clean,
                progress=job,
            )
            if mask is not None and config.keep_background:
                edit.raw.save(folder / "raw.png")
            missing = runs.write(folder, model, image, mask, options, edit, job)
            for error in missing.values():
                if isinstance(error, Stopped):
                    raise error
            notes = [*advice.after(edit, options), *advice.about_fidelity(edit, image, options)]
            job.notes = [in_words(note) for note in [*notes, *advice.about_missing(missing)]]
        except Stopped:
            if not job.steps:
                raise
            job.message = f"stopped at {job.stage} {job.done} of {job.total}: this is the edit so far"
            write_stopped(folder, model, job, image, mask, lora)


def watch(job: Job, preview: LatentPreview, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Note the handles of each step of a job, in pixels of an image of `size`, and now and then a preview."""
    job.paths = [[] for _ in job.options.drags]

    def on_step(step: Step) -> None:
        for path, handle in zip(job.paths, to_pixels(step.handles, size, grid), strict=True):
            path.append(handle)
        now = time.perf_counter()
        if job.preview is None or now - job.preview_time >= PREVIEW_EVERY:
            job.preview = preview.preview(step.predicted, now - job.started)
            job.preview_time = now
            job.previews += 1

    job.on_step = on_step


def write_stopped(
    folder: Path, model: Model, job: Job, image: Image.Image, mask: Tensor | None, lora: LoRA
) -> None:
    """Write the image predicted last, unless an edit is finished, the LoRA, and run.json."""
    options = job.options
    file = folder / "edited.png"
    if not file.exists():
        edited = images.resize(decode(model, job.steps[-1].predicted), image.size)
        if mask is not None and options.config.keep_background:
            edited = images.paste(edited, image, mask)
        edited.save(file)
        if lora.unet:
            notes = lora_cache.notes(model, options.prompt, options.config, options.seed)
            lora_file.write(lora, folder / "lora.safetensors", notes)
    handles: list[Pixel] = [path[-1] for path in job.paths]
    result = {
        "stopped": job.message,
        "arrived": False,
        "distances": [math.dist(*drag) for drag in options.drags],
        "remaining": [math.dist(*pair) for pair in zip(handles, options.targets, strict=True)],
        "paths": job.paths,
        "losses": [step.loss for step in job.steps if step.loss is not None],
        "seconds": job.seconds,
    }
    values = to_json(options) | {"versions": lora_cache.versions(), "result": result}
    (folder / "run.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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
