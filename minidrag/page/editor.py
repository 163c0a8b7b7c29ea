"""One edit of the page: what demo.py does, with a model that stays, and with what a stopped edit leaves."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from minidrag import images
from minidrag.app import advice, lora_cache, runs
from minidrag.app.options import Options, open_input, open_model, to_json
from minidrag.edit import drag_edit, prepare
from minidrag.method.drag import Step
from minidrag.method.lora import LoRA
from minidrag.model import Model, decode
from minidrag.page.foresee import Foresight
from minidrag.page.job import Job, Stopped, key
from minidrag.points import to_pixels
from minidrag.weights import lora_file

SEEN_EVERY = 0.25  # seconds between two pictures of what the UNet foresees


class Editor:
    """Holds the model; only one thread may use it."""

    def __init__(self):
        self.model: Model | None = None
        self.name = ""  # of the model
        self.ready: set[tuple[Any, ...]] = set()  # LoRAs that are in the cache

    def do(self, job: Job) -> None:
        """Do a job of any kind."""
        job.started = time.perf_counter()
        if job.kind == "edit":
            return self.edit(job)
        job.enter("model")
        model = self.load(job.options)
        if job.kind == "learn":
            self.find_lora(model, open_input(job.options)[0], job)

    def load(self, options: Options) -> Model:
        """Return the model of a job; the one before stays until it is there."""
        if self.model is None or self.name != options.model:
            self.model, self.name = open_model(options), options.model
        return self.model

    def find_lora(self, model: Model, image: Image.Image, job: Job) -> LoRA:
        """Return the LoRA of a job, trained unless it is in the cache."""
        options = job.options
        lora, _ = lora_cache.find_lora(model, image, options.prompt, options.config, options.seed, job)
        self.ready.add(key(options))
        return lora

    def edit(self, job: Job) -> None:
        """Do a job and write its results, as demo.py does; a stopped one leaves what it had come to.

        Raises Stopped for one that was stopped before its drag began.
        """
        options = job.options
        with runs.output(None, options.image or Path("generated")) as folder:
            job.enter("model")
            with job.timed("model"):
                model = self.load(options)
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
        image, mask = open_input(options, folder / "generated.png")
        drags = options.handles, options.targets
        grid = prepare(model, image.size, *drags, mask, options.config).grid  # before the long training
        job.notes = [in_words(note) for note in advice.before(model, image, mask, options)]
        told: dict[str, Any] = {"prompt": options.prompt, "config": options.config, "progress": job}
        lora = self.find_lora(model, image, job)
        job.paths = [[] for _ in options.drags]
        foresight = Foresight(model, image, options.config)
        job.see = lambda step: see(foresight, job, step, image.size, grid)
        try:
            edit = drag_edit(model, image, *drags, mask=mask, lora=lora, clean=clean, **told)
            if mask is not None and options.config.keep_background:
                edit.raw.save(folder / "raw.png")
            missing = runs.write(folder, model, image, mask, options, edit, job)
            for stopped in (error for error in missing.values() if isinstance(error, Stopped)):
                raise stopped
            found = [*advice.after(edit, options), *advice.about_fidelity(edit, image, options)]
            job.notes = [in_words(line) for line in [*found, *advice.about_missing(missing)]]
        except Stopped:
            if not job.steps:
                raise
            job.message = f"stopped at {job.stage} {job.done} of {job.total}: this is what there was"
            keep(model, folder, job, image, mask, lora)


def see(foresight: Foresight, job: Job, step: Step, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Note where the handles are, and now and then what the UNet foresees."""
    for path, at in zip(job.paths, to_pixels(step.handles, size, grid), strict=True):
        path.append(at)
    now = time.perf_counter()
    if job.picture is None or now - job.seen >= SEEN_EVERY:
        job.picture, job.seen = foresight.look(step.predicted, now - job.started), now
        job.pictures += 1


def keep(model: Model, folder: Path, job: Job, image: Image.Image, mask: Tensor | None, lora: LoRA) -> None:
    """Write the picture that was foreseen last, unless one is finished, the LoRA, and run.json."""
    options, file = job.options, folder / "edited.png"
    if not file.exists():
        raw = images.resize(decode(model, job.steps[-1].predicted), image.size)
        if mask is not None and options.config.keep_background:
            raw = images.paste(raw, image, mask)
        raw.save(file)
        if lora.unet:
            notes = lora_cache.notes(model, options.prompt, options.config, options.seed)
            lora_file.write(lora, folder / "lora.safetensors", notes)
    result = {
        "stopped": job.message,
        "arrived": False,
        "distances": [math.dist(*drag) for drag in options.drags],
        "remaining": [math.dist(path[-1], at) for path, at in zip(job.paths, options.targets, strict=True)],
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
    return re.sub(r"--([a-z-]+)", lambda found: named.get(found[1], found[1].replace("-", " ")), sentence)
