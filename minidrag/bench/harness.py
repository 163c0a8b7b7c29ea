"""Shared by the measurements of edits: options, running cases, results, tables, and exit status."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import nn

from minidrag import images
from minidrag.app import draw
from minidrag.app.lora_cache import find_lora
from minidrag.app.options import CONFIG_HELP, CONFIGS, configured
from minidrag.app.progress import Progress
from minidrag.bench.cases import (
    KINDS,
    Case,
    Edited,
    Editor,
    Learned,
    SceneCase,
    measure,
    references,
)
from minidrag.bench.metrics import Missing, fidelity_network
from minidrag.bench.styles import STYLES
from minidrag.bench.tables import EXPLAINED, Results, mean_seconds, report, summarize
from minidrag.config import EditConfig
from minidrag.edit import drag_edit
from minidrag.points import to_task
from minidrag.weights.model import Model, load_model

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """Cases to edit, and how to measure them."""

    model: Model
    cases: Sequence[Case]
    learned: Learned
    settings: Callable[[EditConfig], dict[str, Any]]  # everything that decides the results under a config
    broken: int = 0  # cases that could not be read


def add_scene_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", type=count, default=60, help="number of cases (default: %(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--style", choices=STYLES, default="plain", help=f"look of the scenes: {', '.join(STYLES)}")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of all measurements of edits."""
    add = parser.add_argument
    add("--model", help="as for demo.py (default: tiny for scenes, sd15 for DragBench)")
    add("--seed", type=int, default=0, help="of edits and rendered scenes (default: %(default)s)")
    add_config_arguments(parser)
    add("--out", type=Path, help="folder for the results (default: one in runs, named by the settings)")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", choices=CONFIGS, help=CONFIG_HELP)
    add(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="any field of EditConfig"
    )


def count(text: str) -> int:
    """Parse a positive integer; ValueError, which argparse reports, for anything else."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def value_of(text: str) -> Any:
    """Parse a setting: a number, true, false, null, or else the word itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_config(args: argparse.Namespace) -> EditConfig:
    """Build the config from --config and --set; ValueError for unknown names and invalid values."""
    values = {}
    for text in args.set:
        name, found, value = text.partition("=")
        if not found:
            raise ValueError(f"invalid --set {text!r}: expected FIELD=VALUE")
        values[name] = value_of(value)
    return configured(CONFIGS.get(args.config, EditConfig()), values)


def editor(model: Model, config: EditConfig, seed: int) -> Editor:
    """Edit a case with a LoRA of its own, trained now or cached by an earlier run."""

    def edit(case: Case) -> Edited:
        mask = torch.from_numpy(case.mask.astype(np.float32))
        to_task(model, case.before.size, case.handles, case.targets, mask, config)  # before the long training
        progress = Progress(show=False)
        lora, _ = find_lora(model, case.before, case.prompt, config, seed, progress)
        edit = drag_edit(
            model,
            case.before,
            case.handles,
            case.targets,
            mask=mask,
            prompt=case.prompt,
            config=config,
            lora=lora,
            progress=progress,
        )
        return Edited(edit.image, edit.raw, progress.seconds)

    return edit


def run_case(
    case: Case, edit: Editor, learned: Learned, others: dict[str, Image.Image], folder: Path
) -> None:
    """Edit and measure one case; write its images and, last, result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    edited = edit(case)
    began = time.perf_counter()
    rows = {"edit": measure(case, edited.image, edited.raw, learned)}
    rows |= {name: measure(case, picture, picture, learned) for name, picture in others.items()}
    seconds = edited.seconds | {"measuring": time.perf_counter() - began}
    result = {"case": case.name, "kind": case.kind, "drag": case.drags, "prompt": case.prompt}
    result |= {"rows": rows, "seconds": seconds}
    marked = draw.draw_drags(case.before, case.handles, case.targets, torch.from_numpy(case.mask))
    shown = {"drag": marked, "edit": edited.image, "raw": edited.raw}
    shown |= {"truth": case.truth} if isinstance(case, SceneCase) else {}
    case.before.save(folder / "before.png")
    for name, picture in (shown | others).items():
        if picture is not case.before:
            picture.save(folder / f"{name.replace(' ', '-')}.png")
    write_json(result, folder / "result.json")


def run_cases(
    cases: Sequence[Case],
    edit: Editor,
    learned: Learned,
    out: Path,
    model: Model | None = None,
    compare: bool = True,
) -> list[dict[str, Any]]:
    """Run this process's share of the unfinished cases; return the results of all finished ones.

    model: for the reference rows that need one. compare: measure reference rows too.
    An edit with numbers out of range or without enough memory is reported and skipped.
    """
    rank, processes = place_among_processes()
    for case in tqdm(cases[rank::processes], desc="cases", mininterval=5):
        folder = out / "cases" / case.name
        if (folder / "result.json").is_file():
            continue
        try:
            run_case(case, edit, learned, references(case, model) if compare else {}, folder)
        except (FloatingPointError, torch.cuda.OutOfMemoryError) as error:
            print(f"minidrag: {case.name} failed: {' '.join(str(error).split())}", file=sys.stderr)
    return results_of(cases, out)


def place_among_processes() -> tuple[int, int]:
    """Rank and number of processes under torchrun; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def results_of(cases: Sequence[Case], out: Path) -> list[dict[str, Any]]:
    """Results of the finished cases, in order, whichever process ran them."""
    files = [out / "cases" / case.name / "result.json" for case in cases]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def write_until_all_are_seen(read: Callable[[], T], write: Callable[[T], str]) -> str:
    """Write tables of the results, again while other processes finish more cases.

    The last process to write has seen all of them, and none has to wait for another.
    """
    results = read()
    while True:
        text, before = write(results), results
        results = read()
        if results == before:
            return text


def settings_of(
    model: Model, config: EditConfig, seed: int, compare: bool, network: nn.Module | None
) -> dict[str, Any]:
    """Everything that decides the results of a case; the model by a few of its weights."""
    measured = {"references": compare, "IF": network is not None}
    return {"weights": fingerprint(model), "seed": seed, **measured, "config": asdict(config)}


def fingerprint(model: Model) -> str:
    """Digest of a few weights of every tensor, enough to tell two models apart."""
    digest = hashlib.sha256()
    for network in (model.unet, model.vae, model.text_encoder):
        for tensor in network.state_dict().values():
            digest.update(tensor.flatten()[:16].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_out(out: Path | None, settings: dict[str, Any], name: str = "scenes") -> Path:
    """Make the folder for results of these settings; ValueError if it has results of others."""
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    out = out or Path("runs") / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    file = out / "settings.json"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} has results of other settings: give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    write_text(text, file)
    return out


def write_text(text: str, file: Path) -> None:
    """Write all of a file or nothing: other processes may read and write it too."""
    images.write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_json(values: Any, file: Path) -> None:
    write_text(json.dumps(values, indent=1) + "\n", file)


def fidelity() -> nn.Module | None:
    """Load the network for IF; if it is unavailable, say so and return None."""
    try:
        return fidelity_network()
    except Missing as reason:
        print(f"minidrag: {reason}", file=sys.stderr)
        return None


def write_tables(results: Results, out: Path, explained: str = EXPLAINED) -> str:
    """Write table.json, table.md, and seconds.json; return the text to print."""
    summary, seconds = summarize(results), mean_seconds(results)
    text = report(summary, explained)
    write_json(summary, out / "table.json")
    write_text(text + "\n", out / "table.md")
    write_json(seconds, out / "seconds.json")
    times = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{text}\n\nSeconds per case: {times}"


def load(args: argparse.Namespace) -> Model:
    return load_named(args.model or "tiny")


def load_named(source: str) -> Model:
    """Load a model in float32; under torchrun on the GPU of this process."""
    local, gpus = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    device = f"cuda:{int(local) % gpus}" if local and gpus else None
    return load_model(source, device=device)


def finish(
    cases: Sequence[Case], out: Path, write: Callable[[list[dict[str, Any]], Path], str], broken: int = 0
) -> int:
    """Write the tables of the finished cases and print them; return the exit status."""
    text = "no case is finished"
    if results_of(cases, out):
        text = write_until_all_are_seen(lambda: results_of(cases, out), lambda some: write(some, out))
    return tell(text, out, len(results_of(cases, out)), len(cases), broken)


def tell(text: str, out: Path, done: int, wanted: int, broken: int) -> int:
    """Print the tables once they are complete; return the exit status, 1 if a case is missing.

    broken: cases that could not be read. Under torchrun a status of 1 would stop the other processes, so it
    is returned only when all are finished.
    """
    if done < wanted and place_among_processes()[1] > 1:
        print(f"{done} of {wanted} edits are finished: other processes are working on the rest, or it failed")
        return 0
    print(f"{text}\nWritten to {out}")
    return int(done < wanted or broken > 0)


def work(job: Callable[[], int]) -> int:
    """Run a job and return its exit status: 2 for an error, 130 for Ctrl-C, each with one sentence."""
    try:
        return job()
    except (ValueError, OSError) as error:
        print(f"minidrag: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minidrag: stopped; the same command resumes", file=sys.stderr)
        return 130
