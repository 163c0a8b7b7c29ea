"""The conversions: single file to folder, pickles to safetensors, float32 to float16."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minidrag.weights import model as weights
from minidrag.weights.checkpoint import PICKLES, Part
from weights_convert.configs import JSON, MODEL_INDEX, SCHEDULER, TOKENIZER
from weights_convert.files import Tensors, load, save, written_whole

NETWORKS = ("unet", "vae", "text_encoder", ".")  # the last: a folder with one network and nothing else
SMALL = ("model_index.json", "tokenizer/*.json", "tokenizer/*.txt", "scheduler/*.json")


def to_folder(file: Path, out: Path, tokenizer: Path | None = None) -> bool:
    """Takes a single-file checkpoint of SD 1.x apart into a folder in the official layout.

    Of two copies of the UNet the averaged one (EMA) is kept; numbers keep their dtypes. tokenizer: a folder.
    Returns whether a tokenizer was found, there or beside the file: without one the folder is not complete.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder already: give a single-file checkpoint")
    parts = weights.single_file_parts(file, list(weights.STEMS))
    words = find_tokenizer(file, tokenizer)
    with written_whole(out) as folder:
        for name, part in parts.items():
            save(read(part), folder / name / f"{weights.STEMS[name]}.safetensors")
            write_json(folder / name / "config.json", JSON[name](weights.SINGLE_FILE[name]))
        write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
        write_json(folder / "model_index.json", MODEL_INDEX)
        if words is not None:
            write_json(folder / "tokenizer/tokenizer_config.json", TOKENIZER)
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(words / name, folder / "tokenizer" / name)
    return words is not None


def find_tokenizer(file: Path, given: Path | None) -> Path | None:
    place = given or file.parent
    for folder in (place / "tokenizer", place):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    if given:
        raise FileNotFoundError(f"{given} has no vocab.json and merges.txt, nor has {given / 'tokenizer'}")
    return None


def read(part: Part) -> Tensors:
    with safe_open(part.file, "pt") as file:
        empty = part.network.state_dict()
        return {name: file.get_tensor(part.names[name]).reshape(empty[name].shape) for name in empty}


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def to_safetensors(source: Path, out: Path) -> None:
    """Rewrites a .bin, .ckpt or .pt file, or the weights of a model folder, as safetensors."""
    if source.is_dir():
        pickles, done = network_files(source, "*.bin"), network_files(source, "*.safetensors")
        if not pickles + done:
            raise FileNotFoundError(
                f"{source} has no weights of a model folder, neither .bin nor .safetensors: "
                "for a single-file checkpoint in it give that file"
            )
        with written_whole(out) as folder:
            copy_small(source, folder)
            for file in done:
                copy(file, folder / file.relative_to(source))
            for file in pickles:
                # transformers' name for a pickle differs from that for safetensors; diffusers' does not.
                name = file.stem.removeprefix("pytorch_") + ".safetensors"
                target = folder / file.relative_to(source).with_name(name)
                if not target.exists():
                    save(load(file), target)
    elif source.suffix in PICKLES:
        tensors = load(source)
        with written_whole(out) as file:
            save(tensors, file)
    else:
        raise ValueError(
            f"{source} is no .bin, .ckpt, .pt or .pth file and no folder, so there is nothing to convert"
        )


def to_half(source: Path, out: Path) -> None:
    """Rounds the weights of a file or a model folder to float16; a folder's get the infix .fp16."""
    if not source.is_dir():
        tensors = halved(load(source), source)
        with written_whole(out) as file:
            save(tensors, file)
        return
    files = [file for file in network_files(source, "*.safetensors") if "." not in file.stem]
    if not files:
        raise FileNotFoundError(f"{source} has no weights in .safetensors files, or only variants of them")
    with written_whole(out) as folder:
        copy_small(source, folder)
        for file in files:
            target = folder / file.relative_to(source).with_name(f"{file.stem}.fp16.safetensors")
            save(halved(load(file), file), target)


def halved(tensors: Tensors, file: Path) -> Tensors:
    return {name: half(name, tensor, file) for name, tensor in tensors.items()}


def half(name: str, tensor: Tensor, file: Path) -> Tensor:
    """Float16, but whole numbers stay what they are; position_ids become whole again where they are not."""
    if name.endswith("position_ids"):
        return tensor.round().to(torch.int64)
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(torch.float16)
    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} in {file} has values too large for float16 (above 65504)")
    return rounded


def network_files(source: Path, pattern: str) -> list[Path]:
    """The weight files of a model folder, plain and .fp16, not of parts that minidrag has no use for."""
    files = [file for name in NETWORKS for file in sorted((source / name).glob(pattern))]
    return [file for file in files if file.stem.removesuffix(".fp16") in STEMS]


STEMS = {"diffusion_pytorch_model", "model", "pytorch_model"}


def copy_small(source: Path, folder: Path) -> None:
    """Copies configs, tokenizer and scheduler."""
    configs = [source / name / "config.json" for name in NETWORKS]
    small = [file for pattern in SMALL for file in source.glob(pattern)]
    for file in [file for file in configs if file.is_file()] + small:
        copy(file, folder / file.relative_to(source))


def copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
