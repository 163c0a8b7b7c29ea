"""Edits scenes whose true result is known and measures how near to it the edits come.

    python -m minidrag.bench scenes [--cases 60] [--kinds object light ...] [--set lora_steps=40]

Finished cases are kept: the same command goes on where it was stopped, and makes the same table.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch import nn

from minidrag import images
from minidrag.bench.cases import (
    KINDS,
    Case,
    Edited,
    Editor,
    Learned,
    learned_measures,
    make_cases,
    measure,
    references,
)
from minidrag.bench.metrics import Missing, fidelity_network
from minidrag.bench.tables import mean_seconds, report, summarise
from minidrag.edit import EditConfig, drag_edit
from minidrag.request import Request, configured
from minidrag.runs import find_lora
from minidrag.tiny import MODEL
from minidrag.weights import Model, load_model

CONFIGS = {"paper": EditConfig, "official": EditConfig.official}
ACROSS, TILE = 3, 240  # cases side by side on the contact sheet, and how high they are


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--no-references", action="store_true", help="measure the edits alone")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What all measurements on scenes share."""
    add = parser.add_argument
    add("--model", default=MODEL, help="as for demo.py (default: the small one that ships)")
    add("--cases", type=count, default=60, help="how many (default: %(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--seed", type=int, default=0, help="of cases and edits (default: %(default)s)")
    add("--config", choices=CONFIGS, default="paper", help="paper, or official: the authors' program")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="any field of EditConfig")
    add("--out", type=Path, help="folder of the results (default: one under runs, by the settings)")


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
    return configured(CONFIGS[args.config](), values)


def editor(model: Model, config: EditConfig, seed: int) -> Editor:
    """Edits a case with a LoRA of its own, trained or kept from an earlier run."""

    def edit(case: Case) -> Edited:
        drag, mask = case.drag, torch.from_numpy(case.mask.astype(np.float32))
        pairs = list(zip(drag.handles, drag.targets, strict=True))
        asked = Request(Path(f"{case.name}.png"), pairs, prompt=case.prompt, config=config, seed=seed)
        began = time.perf_counter()
        lora, origin = find_lora(model, case.before, asked)
        seconds = {"LoRA": time.perf_counter() - began} if origin.startswith("trained") else {}
        options: dict[str, Any] = {"mask": mask, "prompt": case.prompt, "config": config, "seed": seed}
        edit = drag_edit(model, case.before, drag.handles, drag.targets, **options, trained=lora)
        return Edited(edit.picture, edit.raw, seconds | edit.seconds)

    return edit


def run_case(
    case: Case, edit: Editor, learned: Learned, others: dict[str, Image.Image], folder: Path
) -> None:
    """Edits and measures one case and writes the pictures and, last, result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    edited = edit(case)
    began = time.perf_counter()
    rows = {"edit": measure(case, edited.picture, edited.raw, learned)}
    rows |= {name: measure(case, picture, picture, learned) for name, picture in others.items()}
    seconds = edited.seconds | {"measuring": time.perf_counter() - began}
    result = {"case": case.name, "kind": case.kind, "drag": case.drag.name, "prompt": case.prompt}
    result |= {"rows": rows, "seconds": seconds}
    marked = images.draw_drags(case.before, case.drag.handles, case.drag.targets, torch.from_numpy(case.mask))
    shown = {"before": case.before, "drag": marked, "edit": edited.picture}
    shown |= {"raw": edited.raw, "truth": case.truth}
    for name, picture in (shown | others).items():
        picture.save(folder / f"{name.replace(' ', '-')}.png")
    text = json.dumps(result, indent=1) + "\n"
    images.write_whole(folder / "result.json", lambda path: path.write_text(text, encoding="utf-8"))


def run_cases(
    cases: Sequence[Case],
    edit: Editor,
    learned: Learned,
    out: Path,
    model: Model | None = None,
    compare: bool = True,
) -> list[dict[str, Any]]:
    """The results of all cases, those that are in `out` already read from there.

    model: for the reference rows that need one. compare: whether there are reference rows.
    An edit whose numbers leave their range is told of and left out; the rest goes on.
    """
    results = []
    for case in tqdm(cases, desc="cases", mininterval=5):
        folder = out / "cases" / case.name
        if not (folder / "result.json").is_file():
            try:
                others = references(case, model) if compare else {}
                run_case(case, edit, learned, others, folder)
            except FloatingPointError as error:
                print(f"minidrag: {case.name} failed: {error}", file=sys.stderr)
                continue
        results.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    return results


def settings_of(
    model: Model, config: EditConfig, seed: int, compare: bool, network: nn.Module | None
) -> dict[str, Any]:
    """What decides the results of a case, the model by a few of its weights."""
    digest = hashlib.sha256()
    for network in (model.unet, model.vae, model.text_encoder):
        for tensor in network.state_dict().values():
            digest.update(tensor.flatten()[:16].cpu().double().numpy().tobytes())
    weights = digest.hexdigest()[:16]
    measured = {"references": compare, "IF": network is not None}
    return {"weights": weights, "seed": seed, **measured, "config": asdict(config)}


def open_out(out: Path | None, settings: dict[str, Any], name: str = "scenes") -> Path:
    """The folder for results of these settings; ValueError where it holds those of others."""
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    out = out or Path("runs") / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    file = out / "settings.json"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds results of other settings: give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return out


def fidelity() -> nn.Module | None:
    """The network for IF; None where it cannot be had, which is said."""
    try:
        return fidelity_network()
    except Missing as reason:
        print(f"minidrag: {reason}", file=sys.stderr)
        return None


def write_report(results: list[dict[str, Any]], out: Path) -> str:
    """Writes table.json, table.md, seconds.json and sheet.png; returns what is to be shown."""
    summary, seconds = summarise(results), mean_seconds(results)
    text = report(summary)
    (out / "table.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "seconds.json").write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
    sheet(results, out).save(out / "sheet.png")
    times = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{text}\n\nSeconds per case: {times}"


def sheet(results: list[dict[str, Any]], out: Path) -> Image.Image:
    """All cases: the original with its drags, the edit and the truth, under name and outcome."""
    tiles = []
    for result in results:
        folder, row = out / "cases" / result["case"], result["rows"]["edit"]
        pictures = [Image.open(folder / f"{name}.png") for name in ("drag", "edit", "truth")]
        outcome = (
            "lost" if row["lost"] else f"{row['distance']:.1f} px off, {row['share']:.0%} of the way left"
        )
        tile = images.side_by_side(pictures, [result["drag"], outcome, "truth"])
        tiles.append(images.resize(tile, (round(tile.width * TILE / tile.height), TILE)))
    gap, (width, height) = 24, tiles[0].size
    across, rows = min(ACROSS, len(tiles)), -(-len(tiles) // ACROSS)
    size = (width + gap) * across + gap, (height + gap) * rows + gap
    page = Image.new("RGB", size, images.WHITE)
    for i, tile in enumerate(tiles):
        page.paste(tile, (gap + (width + gap) * (i % ACROSS), gap + (height + gap) * (i // ACROSS)))
    return page


def load(args: argparse.Namespace) -> Model:
    return load_model(MODEL if args.model == "tiny" else args.model)


def run(args: argparse.Namespace) -> int:
    try:
        config, compare = read_config(args), not args.no_references
        model, network = load(args), fidelity()
        out = open_out(args.out, settings_of(model, config, args.seed, compare, network))
        cases = make_cases(args.cases, args.kinds, args.seed)
        edit, learned = editor(model, config, args.seed), learned_measures(model, network)
        results = run_cases(cases, edit, learned, out, model, compare)
        if results:
            print(write_report(results, out))
            print(f"Written to {out}")
    except (ValueError, OSError) as error:
        print(f"minidrag: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minidrag: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return int(len(results) < len(cases))
