"""The conversions: single file to folder, pickles to safetensors, float32 to float16."""

import shutil
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minidrag.system.files import write_json
from minidrag.weights import load as weights
from minidrag.weights.checkpoint import NetworkFile
from minidrag.weights.configs import model_files
from minidrag.weights.files import PICKLES, check_not_shard, read_header, read_tensor
from minidrag.weights.hub import OPTIONAL, VOCABULARY
from minidrag.weights.vocabulary import SETTINGS
from weights_convert.files import (
    PICKLE_INDEX,
    Tensors,
    load,
    load_checkpoint,
    read_metadata,
    save,
    written_whole,
)

NETWORKS = ("unet", "vae", "text_encoder", ".")  # the last: a folder of one network
SMALL = ("model_index.json", "tokenizer/*.json", "tokenizer/*.txt", "scheduler/*.json")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of weight files; the last: a pickle's


def to_folder(file: Path, out: Path, tokenizer: Path | None = None) -> bool:
    """Convert a single-file checkpoint of SD 1.x to a folder in the official layout; dtypes do not change.

    Of two copies of the UNet, the moving average (EMA) is kept. tokenizer: a folder; by default, one beside
    the file. Returns False if there is none: the model folder is then incomplete.
    """
    if file.is_dir():
        raise ValueError(f"{file} is already a folder: give a single-file checkpoint")
    files, scheduler = weights.open_model(file, None, torch.float32)
    vocabulary = weights.find_vocabulary(tokenizer or file.parent)
    if vocabulary or tokenizer:
        weights.open_tokenizer(file, vocabulary or tokenizer, files)
    sizes = {name: network.network.config for name, network in files.items()}
    small = model_files(**sizes, sampler="PNDMScheduler")
    small["scheduler/scheduler_config.json"]["prediction_type"] = scheduler["prediction_type"]
    if vocabulary is not None:
        small["tokenizer/tokenizer_config.json"] = SETTINGS
    with written_whole(out) as folder:
        for name, network in files.items():
            save(read(network), folder / name / f"{weights.STEMS[name]}.safetensors")
        for name, values in small.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, values)
        for name in (*VOCABULARY, *OPTIONAL):
            if vocabulary and name.startswith("tokenizer/") and (vocabulary / Path(name).name).is_file():
                shutil.copyfile(vocabulary / Path(name).name, folder / name)
    return vocabulary is not None


def read(file: NetworkFile) -> Tensors:
    empty = file.network.state_dict()
    return {name: read_tensor(file.header, file.keys[name]).reshape(empty[name].shape) for name in empty}


def to_safetensors(source: Path, out: Path) -> None:
    """Convert a .bin, .ckpt, .pt or .pth file, or the weights of a model folder, to safetensors.

    Shards become one file.
    """
    if source.is_dir():
        files = network_files(source, ".safetensors")
        pickles = network_files(source, ".bin")
        files |= {file: name for file, name in pickles.items() if name not in files.values()}
        if not files:
            raise FileNotFoundError(
                f"{source} is not a model folder with .bin or .safetensors files: "
                "to convert a single-file checkpoint in it, give that file"
            )
        check_known(source, files)
        with written_whole(out) as folder:
            copy_small(source, folder)
            for file, name in files.items():
                if file.suffix == ".safetensors":
                    read_header(file)  # raises for a broken one
                    copy(file, folder / name)
                else:
                    save(load(file), folder / name)
    elif source.suffix in PICKLES or source.name.endswith(PICKLE_INDEX):
        check_not_shard(source)
        tensors = load_checkpoint(source)
        with written_whole(out) as file:
            save(tensors, file)
    else:
        raise ValueError(f"{source} is not a .bin, .ckpt, .pt or .pth file or a folder: nothing to convert")


def to_half(source: Path, out: Path) -> None:
    """Round the weights of a file or a model folder to float16; files in a folder get the infix .fp16."""
    if not source.is_dir():
        tensors = halved(load_checkpoint(source), source)
        with written_whole(out) as file:
            save(tensors, file, adapter_metadata(source))
        return
    files = network_files(source, ".safetensors", infixes=("",))
    if not files:
        raise FileNotFoundError(f"{source} has no weights in .safetensors files, or only .fp16 variants")
    check_known(source, files)
    with written_whole(out) as folder:
        copy_small(source, folder)
        for file, name in files.items():
            save(halved(load(file), file), folder / name.with_suffix(".fp16.safetensors"))


def adapter_metadata(file: Path) -> dict[str, str]:
    """Return the metadata with a LoRA's alpha; one key, as safetensors writes several in random order."""
    key = "lora_adapter_metadata"
    metadata = read_metadata(file)
    return {key: metadata[key]} if key in metadata else {"format": "pt"}


def halved(tensors: Tensors, file: Path) -> Tensors:
    return {name: half(name, tensor, file) for name, tensor in tensors.items()}


def half(name: str, tensor: Tensor, file: Path) -> Tensor:
    """Round floats to float16; integers do not change, and float position_ids become integers again."""
    if name.endswith("position_ids"):
        return tensor.round().to(torch.int64)
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8 bits have no isfinite
    rounded = tensor.to(torch.float16)
    if not torch.equal(rounded.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} in {file} has values above 65504, too large for float16: keep float32")
    return rounded


def network_files(source: Path, suffix: str, infixes: tuple[str, ...] = ("", ".fp16")) -> dict[Path, Path]:
    """Map the weight files or indices of the networks in a model folder to the names of the results.

    suffix: .safetensors or .bin. Names are relative to the folder.
    """
    result = {}
    for folder, stem, infix in product(NETWORKS, STEMS, infixes):
        names = (f"{stem}{infix}{suffix}", f"{stem}{suffix}.index{infix}.json")
        files = [source / folder / name for name in names if (source / folder / name).is_file()]
        for file in files[:1]:
            # transformers names pickles and safetensors files differently; diffusers does not.
            result[file] = Path(folder) / f"{stem.removeprefix('pytorch_')}{infix}.safetensors"
    return result


def check_known(source: Path, files: Iterable[Path]) -> None:
    """Raise FileNotFoundError for a network in a model folder with none of the `files`."""
    known = {file.parent for file in files}
    for folder in (source / name for name in NETWORKS[:-1]):
        if folder.is_dir() and folder not in known:
            content = ", ".join(sorted(file.name for file in folder.iterdir())[:3]) or "nothing"
            raise FileNotFoundError(
                f"{folder} has no weights under a usual name, such as {STEMS[0]}.safetensors, but {content}: "
                "rename them, or download the folder again"
            )


def copy_small(source: Path, folder: Path) -> None:
    """Copy configurations, tokenizer and scheduler."""
    configs = [source / name / "config.json" for name in NETWORKS]
    small = [file for pattern in SMALL for file in source.glob(pattern)]
    for file in [file for file in configs if file.is_file()] + small:
        copy(file, folder / file.relative_to(source))


def copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
