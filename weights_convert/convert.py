"""The conversions: single file to folder, pickles to safetensors, float32 to float16."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minidrag.weights import model as weights
from minidrag.weights.checkpoint import PICKLES, Part
from minidrag.weights.configs import TOKENIZER, load_tokenizer, model_files, write_json
from weights_convert.files import Tensors, load, save, written_whole

NETWORKS = ("unet", "vae", "text_encoder", ".")  # the last: a folder of one network
SMALL = ("model_index.json", "tokenizer/*.json", "tokenizer/*.txt", "scheduler/*.json")


def to_folder(file: Path, out: Path, tokenizer: Path | None = None) -> bool:
    """Convert a single-file checkpoint of SD 1.x to a folder in the official layout; dtypes do not change.

    Of two copies of the UNet, the moving average (EMA) is kept. tokenizer: a folder; by default, one beside
    the file. Returns False if there is none: the model folder is then incomplete.
    """
    if file.is_dir():
        raise ValueError(f"{file} is already a folder: give a single-file checkpoint")
    parts = weights.single_file_parts(file, list(weights.STEMS))
    vocabulary = find_tokenizer(file, tokenizer)
    with written_whole(out) as folder:
        for name, part in parts.items():
            save(read(part), folder / name / f"{weights.STEMS[name]}.safetensors")
        for name, values in model_files(**weights.SINGLE_FILE, sampler="PNDMScheduler").items():
            write_json(folder / name, values)
        if vocabulary is not None:
            write_json(folder / "tokenizer/tokenizer_config.json", TOKENIZER)
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(vocabulary / name, folder / "tokenizer" / name)
    return vocabulary is not None


def find_tokenizer(file: Path, given: Path | None) -> Path | None:
    """The folder of a tokenizer that loads: the one given or one beside the file, None if there is none."""
    place = given or file.parent
    folder = weights.find_vocabulary(place)
    if folder:
        load_tokenizer(folder)
    elif given:
        raise FileNotFoundError(f"neither {given} nor {given / 'tokenizer'} has a vocab.json")
    return folder


def read(part: Part) -> Tensors:
    with safe_open(part.file, "pt") as file:
        empty = part.network.state_dict()
        return {name: file.get_tensor(part.keys[name]).reshape(empty[name].shape) for name in empty}


def to_safetensors(source: Path, out: Path) -> None:
    """Convert a .bin, .ckpt, .pt or .pth file, or the weights of a model folder, to safetensors."""
    if source.is_dir():
        pickles, done = network_files(source, "*.bin"), network_files(source, "*.safetensors")
        if not pickles + done:
            raise FileNotFoundError(
                f"{source} is not a model folder with .bin or .safetensors files: "
                "to convert a single-file checkpoint in it, give that file"
            )
        with written_whole(out) as folder:
            copy_small(source, folder)
            for file in done:
                copy(file, folder / file.relative_to(source))
            for file in pickles:
                # transformers names pickles and safetensors files differently; diffusers does not.
                name = file.stem.removeprefix("pytorch_") + ".safetensors"
                target = folder / file.relative_to(source).with_name(name)
                if not target.exists():
                    save(load(file), target)
    elif source.suffix in PICKLES:
        tensors = load(source)
        with written_whole(out) as file:
            save(tensors, file)
    else:
        raise ValueError(f"{source} is not a .bin, .ckpt, .pt or .pth file or a folder: nothing to convert")


def to_half(source: Path, out: Path) -> None:
    """Round the weights of a file or a model folder to float16; files in a folder get the infix .fp16."""
    if not source.is_dir():
        tensors = halved(load(source), source)
        with written_whole(out) as file:
            save(tensors, file)
        return
    files = [file for file in network_files(source, "*.safetensors") if "." not in file.stem]
    if not files:
        raise FileNotFoundError(f"{source} has no weights in .safetensors files, or only .fp16 variants")
    with written_whole(out) as folder:
        copy_small(source, folder)
        for file in files:
            target = folder / file.relative_to(source).with_name(f"{file.stem}.fp16.safetensors")
            save(halved(load(file), file), target)


def halved(tensors: Tensors, file: Path) -> Tensors:
    return {name: half(name, tensor, file) for name, tensor in tensors.items()}


def half(name: str, tensor: Tensor, file: Path) -> Tensor:
    """Round floats to float16; integers do not change, and float position_ids become integers again."""
    if name.endswith("position_ids"):
        return tensor.round().to(torch.int64)
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(torch.float16)
    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} in {file} has values above 65504, too large for float16: keep float32")
    return rounded


def network_files(source: Path, pattern: str) -> list[Path]:
    """The weight files, plain and .fp16, of the networks in a model folder that minidrag uses."""
    files = [file for name in NETWORKS for file in sorted((source / name).glob(pattern))]
    return [file for file in files if file.stem.removesuffix(".fp16") in STEMS]


STEMS = {"diffusion_pytorch_model", "model", "pytorch_model"}


def copy_small(source: Path, folder: Path) -> None:
    """Copy configurations, tokenizer and scheduler."""
    configs = [source / name / "config.json" for name in NETWORKS]
    small = [file for pattern in SMALL for file in source.glob(pattern)]
    for file in [file for file in configs if file.is_file()] + small:
        copy(file, folder / file.relative_to(source))


def copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
