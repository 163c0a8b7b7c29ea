"""What the measurements of edits share: options, cases by turns, results, tables and exit status."""

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
from minidrag.bench.tables import EXPLAINED, Results, mean_seconds, report, summarize
from minidrag.config import EditConfig
from minidrag.edit import drag_edit
from minidrag.points import to_task
from minidrag.weights.model import Model, load_model

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What is to be edited and how it is measured. settings: of a config, all that decides the results.

    broken: how many cases could not be read.
    """

    model: Model
    cases: Sequence[Case]
    learned: Learned
    settings: Callable[[EditConfig], dict[str, Any]]
    broken: int = 0


def add_scene_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", type=count, default=60, help="how many (default: %(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What all measurements of edits share."""
    add = parser.add_argument
    add("--model", help="as for demo.py (default: tiny for scenes, sd15 for DragBench)")
    add("--seed", type=int, default=0, help="of edits and rendered scenes (default: %(default)s)")
    add_config_arguments(parser)
    add("--out", type=Path, help="folder of the results (default: one under runs, by the settings)")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", choices=CONFIGS, help=CONFIG_HELP)
    add(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="any field of EditConfig"
    )


def count(text: str) -> int:
    """A whole number from 1 on; ValueError, of which argparse makes a message, for others."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def value_of(text: str) -> Any:
    """A setting's value: a number, true, false or null, or else the word itself."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "none", "null") else text)
    except ValueError:
        return text


def read_config(args: argparse.Namespace) -> EditConfig:
    """The constants that were asked for; ValueError for names and values that make no sense."""
    values = {}
    for text in args.set:
        name, found, value = text.partition("=")
        if not found:
            raise ValueError(f"--set {text}: give FIELD=VALUE")
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
    """Edits and measures one case and writes the pictures and, last, result.json."""
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
    """Does this process's share of the cases that are not done yet; returns the results of all that are.

    model: for the reference rows that need one. compare: whether there are reference rows.
    An edit whose numbers leave their range, or for which memory is too small, is told of and left out.
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
    """The number of this process and how many there are, as torchrun says; alone it is 0 of 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def results_of(cases: Sequence[Case], out: Path) -> list[dict[str, Any]]:
    """What is finished of the cases, by whichever process, in their order."""
    files = [out / "cases" / case.name / "result.json" for case in cases]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def write_until_all_are_seen(read: Callable[[], T], write: Callable[[T], str]) -> str:
    """Writes tables of what was read, and again while other processes finish more cases.

    So whoever writes last has seen all, and no process needs to wait for another.
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
    """What decides the results of a case, the model by a few of its weights."""
    measured = {"references": compare, "IF": network is not None}
    return {"weights": fingerprint(model), "seed": seed, **measured, "config": asdict(config)}


def fingerprint(model: Model) -> str:
    """A few weights of every tensor, which tell two models apart."""
    digest = hashlib.sha256()
    for network in (model.unet, model.vae, model.text_encoder):
        for tensor in network.state_dict().values():
            digest.update(tensor.flatten()[:16].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_out(out: Path | None, settings: dict[str, Any], name: str = "scenes") -> Path:
    """The folder for results of these settings; ValueError where it holds those of others."""
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    out = out or Path("runs") / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    file = out / "settings.json"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds results of other settings: give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    write_text(text, file)
    return out


def write_text(text: str, file: Path) -> None:
    """Whole or not at all: other processes may read it, and write it too."""
    images.write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_json(values: Any, file: Path) -> None:
    write_text(json.dumps(values, indent=1) + "\n", file)


def fidelity() -> nn.Module | None:
    """The network for IF; None where it cannot be had, which is said."""
    try:
        return fidelity_network()
    except Missing as reason:
        print(f"minidrag: {reason}", file=sys.stderr)
        return None


def write_tables(results: Results, out: Path, explained: str = EXPLAINED) -> str:
    """Writes table.json, table.md and seconds.json; returns what is to be shown."""
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
    """A model in single precision, under torchrun on the GPU of this process's number."""
    local, gpus = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    device = f"cuda:{int(local) % gpus}" if local and gpus else None
    return load_model(source, device=device)


def finish(
    cases: Sequence[Case], out: Path, write: Callable[[list[dict[str, Any]], Path], str], broken: int = 0
) -> int:
    """Writes the tables of what is done and shows them; returns the exit status."""
    text = "no case is done"
    if results_of(cases, out):
        text = write_until_all_are_seen(lambda: results_of(cases, out), lambda some: write(some, out))
    return tell(text, out, len(results_of(cases, out)), len(cases), broken)


def tell(text: str, out: Path, done: int, wanted: int, broken: int) -> int:
    """Shows the tables once they are whole; returns the exit status: 1 if a case is left out.

    broken: how many could not even be read. Under torchrun a process that returned 1 would stop those still
    at work, so that none does before all is done.
    """
    if done < wanted and place_among_processes()[1] > 1:
        print(f"{done} of {wanted} edits are done: other processes are at work on the rest, or it failed")
        return 0
    print(f"{text}\nWritten to {out}")
    return int(done < wanted or broken > 0)


def work(job: Callable[[], int]) -> int:
    """The exit status of a job; 2 for what cannot be done and 130 for Ctrl-C, said in a sentence."""
    try:
        return job()
    except (ValueError, OSError) as error:
        print(f"minidrag: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minidrag: stopped; the same command goes on from here", file=sys.stderr)
        return 130
