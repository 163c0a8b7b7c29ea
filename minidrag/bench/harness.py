"""Shared by the measurements of edits: options, running cases, results, tables, and exit status."""

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import Tensor, nn

from minidrag import images
from minidrag.app import draw
from minidrag.app.lora_cache import find_lora
from minidrag.app.options import CONFIG_HELP, CONFIGS, FLOATS, configured
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
    measure_back,
)
from minidrag.bench.metrics import Missing, fidelity_network
from minidrag.bench.styles import STYLES
from minidrag.bench.tables import EXPLAINED, Results, mean_seconds, report, summarize
from minidrag.config import EditConfig
from minidrag.edit import drag_edit, prepare
from minidrag.method.lora import LoRA, lora_attached, noise_loss
from minidrag.method.progress import Progress
from minidrag.model import Model, decode
from minidrag.system import console
from minidrag.system.files import check_regular, read_json, sweep, write_whole
from minidrag.weights.load import load_model

T = TypeVar("T")
MAX_CASES = 10_000  # all are drawn before the first is edited
AGAIN = "delete it, and the same command makes it again"


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
    add(
        "--cases",
        type=partial(count, most=MAX_CASES),
        default=60,
        help="number of cases (default: %(default)s)",
    )
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--style", choices=STYLES, default="plain", help=f"look of the scenes: {', '.join(STYLES)}")


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
    add("--config", choices=CONFIGS, help=CONFIG_HELP)
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
        name, found, value = text.partition("=")
        if not found:
            raise ValueError(f"invalid --set {text!r}: expected FIELD=VALUE")
        values[name] = value_of(value)
    return configured(CONFIGS.get(args.config, EditConfig()), values)


def editor(model: Model, config: EditConfig, seed: int, back: bool = False) -> Editor:
    """Edit a case with a LoRA of its own, trained now or cached by an earlier run; back: and drag it back."""

    def edit(case: Case) -> Edited:
        mask = torch.from_numpy(case.mask)
        prepare(model, case.before.size, case.handles, case.targets, mask, config)  # before the long training
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
        autoencoded = images.resize(decode(model, edit.path[0]), case.before.size)
        reconstruction = images.psnr(edit.reconstruction, autoencoded)
        loss = lora_loss(model, lora, edit.path[0], case.prompt)
        return Edited(edit.image, edit.raw, progress.seconds, reconstruction=reconstruction, lora_loss=loss)

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
    """Edit and measure one case; write its images and, last, result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    edited = edit(case)
    began = time.perf_counter()
    own = {"PSNR reconstruction": edited.reconstruction, "LoRA loss": edited.lora_loss}
    rows = {"edit": measure(case, edited.image, edited.raw, learned) | measure_back(case, edited) | own}
    rows |= {name: measure(case, picture, picture, learned) for name, picture in others.items()}
    seconds = edited.seconds | {"measuring": time.perf_counter() - began}
    result = {"case": case.name, "kind": case.kind, "drag": case.drags, "prompt": case.prompt}
    result |= {"rows": rows, "seconds": seconds}
    marked = draw.draw_drags(case.before, case.handles, case.targets, torch.from_numpy(case.mask))
    shown = {"drag": marked, "edit": edited.image, "raw": edited.raw}
    shown |= {"truth": case.truth} if isinstance(case, SceneCase) else {}
    shown |= {"back": edited.back} if edited.back else {}
    write_whole(folder / "before.png", case.before.save)
    for name, picture in (shown | others).items():
        if picture is not case.before:
            write_whole(folder / f"{name.replace(' ', '-')}.png", picture.save)
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
            run_case(case, edit, learned, baselines(case, model) if compare else {}, folder)
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
    """A number that torchrun gives a process. Raises ValueError for one that is none."""
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
        values = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}: {AGAIN}") from None
    try:
        row = values["rows"]["edit"]
        numbers = [*values["seconds"].values()]
        for some in values["rows"].values():
            numbers += [x for value in some.values() for x in (value if isinstance(value, list) else [value])]
        texts = [values[name] for name in ("case", "kind", "drag", "prompt")]
        if isinstance(case, SceneCase) and not row["lost"]:
            numbers += [row["distance"] + 0, row["remaining"] + 0]  # TypeError for None
        intact = all(isinstance(text, str) for text in texts) and texts[0] == case.name
        if intact and all(x is None or isinstance(x, int | float) for x in numbers):
            return values
    except (AttributeError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} is damaged: {AGAIN}")


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
    model: Model, config: EditConfig, seed: int, compare: bool, network: nn.Module | None, back: bool = False
) -> dict[str, Any]:
    """Everything that decides the results of a case; the model by a few of its weights."""
    measured = {"references": compare, "IF": network is not None} | ({"back": True} if back else {})
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
    # Listed first: a process beside this one may write the settings in between.
    others = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if os.path.lexists(file):
        if check_regular(file).read_bytes() != text.encode():
            raise ValueError(f"{out} has results of other settings: give another --out, or delete it")
    elif others:
        raise ValueError(f"{out} has files that are not results of a measurement: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    write_text(text, file)
    return out


def check_new(out: Path | None) -> None:
    """Raise ValueError unless the file of an image can be written; None: one is chosen at the end."""
    if out is None:
        return
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"--out must be a .png file, got {out}")
    if os.path.lexists(out):
        raise ValueError(f"{out} exists already: give another --out, or delete it")


def write_new(out: Path | None, name: str, writer: Callable[[Path], object]) -> Path:
    """Write all of a file that does not exist; None: the first that no other process took, runs/STEM-1, ...

    Returns its path. Raises ValueError if it is there.
    """
    stem, suffix = os.path.splitext(name)
    places = (Path("runs") / f"{stem}-{number}{suffix}" for number in itertools.count(1))
    for path in places if out is None else [out]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.touch(exist_ok=False)  # of two processes, one succeeds
            try:
                write_whole(path, writer)
            except BaseException:
                path.unlink()
                raise
            return path
    raise ValueError(f"{out} exists already: give another --out, or delete it")


def write_text(text: str, file: Path) -> None:
    """Write all of a file or nothing: other processes may read and write it too."""
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


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
    return load_named("tiny" if args.model is None else args.model, args.dtype)


def load_named(source: str, dtype: str | None = None) -> Model:
    """Load a model, by default in float32; under torchrun on the GPU of this process."""
    gpus, under_torchrun = torch.cuda.device_count(), "LOCAL_RANK" in os.environ
    device = f"cuda:{environment('LOCAL_RANK', 0) % gpus}" if under_torchrun and gpus else None
    return load_model(source, device=device, dtype=getattr(torch, dtype) if dtype else None)


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
