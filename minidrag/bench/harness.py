"""Shared by the measurements of edits: options, running cases, results, tables, and exit status."""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor, nn

from minidrag import images
from minidrag.app import draw
from minidrag.app.lora_cache import fingerprint
from minidrag.app.options import CONFIGS, FLOATS, Options, configured, presets_help
from minidrag.app.session import Session
from minidrag.bench.cases import (
    KINDS,
    Case,
    Edited,
    Editor,
    Learned,
    SceneCase,
    baselines,
    dragging_back,
    measure,
)
from minidrag.bench.metrics import Missing, fidelity_network
from minidrag.bench.styles import STYLES
from minidrag.bench.tables import EXPLAINED, Results, mean_seconds, report, summarize
from minidrag.config import EditConfig
from minidrag.method.lora import LoRA, lora_attached, noise_loss
from minidrag.method.progress import Progress
from minidrag.model import Model, decode
from minidrag.system import console
from minidrag.system.files import read_json, reserve, sweep, write_json, write_text, write_whole
from minidrag.weights.load import load_model

MAX_CASES = 10_000  # all are drawn before the first is edited
AGAIN = "delete it and run the command again"


@dataclass(frozen=True)
class Benchmark:
    """Cases to edit, and their measures."""

    model: Model
    cases: Sequence[Case]
    learned: Learned
    settings: Callable[[EditConfig], dict[str, Any]]  # all that decides the results under a config
    broken: int = 0  # number of cases that could not be read


def add_scene_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--cases",
        type=partial(count, most=MAX_CASES),
        default=60,
        help="number of cases (default: %(default)s)",
    )
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--style", choices=STYLES, default="plain", help=f"look of the scenes: {', '.join(STYLES)}")
    add("--no-mask", action="store_true", help="edit without the masks, which still bound the measures")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of all measurements of edits."""
    add = parser.add_argument
    add("--model", help="as for demo.py (default: tiny for scenes, sd15 for DragBench)")
    add_dtype_argument(parser)
    add("--seed", type=seed, default=0, help="of edits and rendered scenes (default: %(default)s)")
    add_config_arguments(parser)
    add("--out", type=Path, help="folder for the results (default: one in runs, named by the settings)")
    add("--back", action="store_true", help="also drag each result back and compare it with the original")


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=FLOATS, help="as for demo.py (default: float32)")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", choices=CONFIGS, help=presets_help())
    add(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="any field of EditConfig"
    )


def count(text: str, least: int = 1, most: int | None = None) -> int:
    """Parse a whole number between bounds; argparse reports the error for anything else."""
    number = int(text) if re.fullmatch(r"[+-]?\d{1,30}", text) else None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"must be a whole number, {bounds}, got {text[:40]}")
    return number


seed = partial(count, least=0, most=2**63 - 1)


def value_of(text: str) -> Any:
    """Parse a setting: a number, true, false, null, or else the word itself."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def read_config(args: argparse.Namespace) -> EditConfig:
    """Build the config from --config and --set; ValueError for unknown names and invalid values."""
    values = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"invalid --set {text!r}: expected FIELD=VALUE")
        values[name] = value_of(value)
    return configured(CONFIGS.get(args.config, EditConfig()), values)


def open_case(
    model: Model, case: Case, config: EditConfig, seed: int = 0, progress: Progress | None = None
) -> Session:
    drags = list(zip(case.handles, case.targets, strict=True))
    options = Options(None, drags, prompt=case.prompt, config=config, seed=seed)
    return Session(model, options, case.before, mask_of(case), progress or Progress(show=False))


def mask_of(case: Case) -> Tensor | None:
    """Mask of an edit, (H, W), bool."""
    return torch.from_numpy(case.mask) if case.masked else None


def editor(model: Model, config: EditConfig, seed: int, back: bool = False) -> Editor:
    """Return the function that edits a case with a LoRA, cached or trained. back: and drags it back."""

    def edit(case: Case) -> Edited:
        progress = Progress(show=False)
        result = open_case(model, case, config, seed, progress).edit()
        window = result.window
        autoencoded = images.resize(decode(model, result.path[0]), window.size)
        reconstruction = images.psnr(window.crop(result.reconstruction), autoencoded)
        loss = lora_loss(model, result.lora, result.path[0], case.prompt)
        plain = window.paste(window.crop(result.raw), case.before, mask_of(case))
        enlarged = plain if config.detail else None
        return Edited(result.image, result.raw, progress.seconds, None, reconstruction, loss, enlarged)

    return dragging_back(edit) if back else edit


@torch.no_grad()
def lora_loss(model: Model, lora: LoRA, clean: Tensor, prompt: str) -> float:
    """Loss of equation 2 with a LoRA over that without it, on the same noise at 20 timesteps.

    clean: latent of the image, (1, 4, H, W).
    """
    if not lora.unet:
        return 1.0
    times = torch.arange(20) * model.schedule.num_train_timesteps // 20
    noise = torch.randn(20, *clean.shape[1:], generator=torch.Generator().manual_seed(2**32)).to(clean)
    losses = []
    for attached in (lora, LoRA({}, {})):
        with lora_attached(model.unet, model.text_encoder, attached):
            text = model.encode_text(prompt)
            loss = partial(noise_loss, model.unet, model.schedule, clean.expand(4, -1, -1, -1), text=text)
            parts = zip(times.split(4), noise.split(4), strict=True)
            losses.append(sum(loss(timestep=t, noise=n).item() for t, n in parts))
    return losses[0] / losses[1]


def run_case(
    case: Case, edit: Editor, learned: Learned, others: dict[str, Image.Image], folder: Path
) -> None:
    """Edit and measure one case; write its images and, last, result.json. others: baselines by name."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    edited = edit(case)
    if edited.enlarged:
        others = others | {"edit without detail": edited.enlarged}
    began = time.perf_counter()
    row = measure(case, edited.image, edited.raw, learned)
    row |= {"PSNR reconstruction": edited.reconstruction, "LoRA loss": edited.lora_loss}
    if edited.back:
        row["PSNR back"] = images.psnr(edited.back, case.before, case.mask)
    rows = {"edit": row} | {name: measure(case, image, image, learned) for name, image in others.items()}
    seconds = edited.seconds | {"measuring": time.perf_counter() - began}
    drawn = draw.draw_drags(case.before, case.handles, case.targets, torch.from_numpy(case.mask))
    views = {"before": case.before, "drag": drawn, "edit": edited.image, "raw": edited.raw}
    if isinstance(case, SceneCase):
        views["truth"] = case.truth
    if edited.back:
        views["back"] = edited.back
    for name, image in (views | others).items():
        write_whole(folder / f"{name.replace(' ', '-')}.png", image.save)
    result = {"case": case.name, "kind": case.kind, "drag": case.drags, "prompt": case.prompt}
    write_json(folder / "result.json", result | {"rows": rows, "seconds": seconds})


def run_cases(
    cases: Sequence[Case], edit: Editor, learned: Learned, out: Path, compare: bool = True
) -> list[dict[str, Any]]:
    """Run this process's share of the unfinished cases; return the results of all finished ones.

    compare: measure the baselines too.
    Reports and skips an edit with numbers out of range or without enough memory.
    """
    rank, processes = place_among_processes()
    for case in tqdm(cases[rank::processes], desc="cases", mininterval=5):
        folder = out / "cases" / case.name
        if (folder / "result.json").is_file():
            continue
        try:
            run_case(case, edit, learned, baselines(case) if compare else {}, folder)
        except (FloatingPointError, RuntimeError, MemoryError) as error:
            if not isinstance(error, FloatingPointError) and not console.is_out_of_memory(error):
                raise
            console.fail(f"{case.name} failed: {console.reason(error)}")
    return results_of(cases, out)


def place_among_processes() -> tuple[int, int]:
    """Rank and number of processes under torchrun; (0, 1) without it. Raises ValueError for others."""
    rank, processes = (environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not rank < max(processes, 1):
        raise ValueError(f"RANK must be less than WORLD_SIZE, {processes}, got {rank}")
    return rank, processes


def environment(name: str, default: int) -> int:
    """A number from torchrun's environment. Raises ValueError for anything else."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{name} must be a whole number, 0 or more, got {text!r}")
    return int(text)


def results_of(cases: Sequence[Case], out: Path) -> list[dict[str, Any]]:
    """Results of the finished cases, in order, whichever process ran them.

    Raises ValueError, with the file and what to do, for a damaged one.
    """
    files = [(case, out / "cases" / case.name / "result.json") for case in cases]
    results = [read_result(case, file) for case, file in files if os.path.lexists(file)]
    for result in results:
        if result["rows"].keys() != results[0]["rows"].keys():
            raise ValueError(f"the results of {result['case']} in {out} are of another measurement: {AGAIN}")
    return results


def read_result(case: Case, file: Path) -> dict[str, Any]:
    try:
        result = read_json(file)
        if not isinstance(result, dict) or result.get("case") != case.name:
            raise ValueError(f"{file} is not a result of {case.name}")
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from None
    return result


def settings_of(
    model: Model, config: EditConfig, seed: int, compare: bool, network: nn.Module | None, back: bool = False
) -> dict[str, Any]:
    """All that decides the results of a case; the model by a few of its weights."""
    measured = {"references": compare, "IF": network is not None} | ({"back": True} if back else {})
    return {"weights": fingerprint(model), "seed": seed, **measured, "config": asdict(config)}


def open_out(out: Path | None, settings: dict[str, Any], name: str = "scenes") -> Path:
    """Make the folder for results of these settings. Raises ValueError if it has other files or results."""
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return reserve(out or Path("runs") / f"{name}-{digest[:8]}", text, "--out")


def fidelity() -> nn.Module | None:
    """Load the network for IF; print a sentence and return None if it is unavailable."""
    try:
        return fidelity_network()
    except Missing as reason:
        print(f"minidrag: {reason}", file=sys.stderr)
        return None


def write_tables(results: Results, out: Path, explained: str = EXPLAINED) -> str:
    """Write table.json, table.md, and seconds.json; return the text to print."""
    summary = summarize(results)
    seconds = mean_seconds(results)
    text = report(summary, explained)
    write_json(out / "table.json", summary)
    write_text(out / "table.md", text + "\n")
    write_json(out / "seconds.json", seconds)
    times = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{text}\n\nSeconds per case: {times}"


def load(args: argparse.Namespace) -> Model:
    return load_named("tiny" if args.model is None else args.model, args.dtype)


def load_named(source: str, dtype: str | None = None) -> Model:
    """Load a model, by default in float32; under torchrun on the GPU of this process."""
    gpus = torch.cuda.device_count()
    local = "LOCAL_RANK" in os.environ and gpus > 0
    device = f"cuda:{environment('LOCAL_RANK', 0) % gpus}" if local else None
    return load_model(source, device=device, dtype=getattr(torch, dtype) if dtype else None)


def finish(
    benchmark: Benchmark, folders: Sequence[Path], write: Callable[[list[Results]], str], out: Path
) -> int:
    """Write the tables of the finished cases and print them; return the exit status, 1 if a case is missing.

    folders: of results, in the order in which `write` gets them. Writes again while other processes finish
    more cases: the last to write has seen all of them, and none waits for another.
    """

    def read() -> list[Results]:
        return [results_of(benchmark.cases, folder) for folder in folders]

    results: list[Results] = []
    text = "no case is finished"
    while any(latest := read()) and latest != results:
        results = latest
        text = write(results)
    done = sum(map(len, results))
    total = len(benchmark.cases) * len(folders)
    if done < total and place_among_processes()[1] > 1:  # torchrun would stop the others for a status of 1
        print(f"{done} of {total} edits are finished: other processes are working on the rest, or it failed")
        return 0
    print(f"{text}\nWritten to {out}")
    return int(done < total or benchmark.broken > 0)
