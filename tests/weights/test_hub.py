"""The hub: only needed files are downloaded, the cache comes first, and missing files are named."""

import re
import shutil
import socket
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import RepositoryNotFoundError
from safetensors.torch import load_file
from support import checkpoints
from support.checkpoints import Tensors, split
from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from minidrag.weights import load as weights
from minidrag.weights.load import load_model

SMALL_FILES = {
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
}


def files(infix: str) -> set[str]:
    """Weight files and indices of shards of a variant."""
    stems = [file.removesuffix(".safetensors") for file in checkpoints.FILES.values()]
    return {
        f"{stem}{end}"
        for stem in stems
        for end in (f"{infix}.safetensors", f".safetensors.index{infix}.json")
    }


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_folder(tmp_path_factory.mktemp("clean") / "model")


@pytest.fixture(scope="module")
def expected(clean: Path) -> Tensors:
    return checkpoints.outputs(load_model(clean, device="cpu"))


class Hub:
    """Stand-in for the hub: copies requested files from one folder to another, the cache."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.cache = repository, cache
        self.online = True
        self.requests: list[tuple[str, set[str]]] = []

    def name(self, file: Path) -> str:
        return file.relative_to(self.repository).as_posix()

    def snapshot_download(self, name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        if not local_files_only:
            if not self.online:
                raise OSError("Name or service not known\nhttps://huggingface.co/api/models")
            self.requests.append((name, set(allow_patterns)))
            for pattern in allow_patterns:
                for file in self.repository.glob(pattern):
                    target = self.cache / file.relative_to(self.repository)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
        if not self.cache.exists():
            raise FileNotFoundError("Cannot find an appropriate cached snapshot folder")
        return str(self.cache)


@pytest.fixture
def hub(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository with all files, including variants and files that are not needed."""
    hub = Hub(Path(shutil.copytree(clean, tmp_path / "hub")), tmp_path / "cache")
    for file in checkpoints.FILES.values():
        half = {key: tensor.half() for key, tensor in load_file(hub.repository / file).items()}
        checkpoints.write(hub.repository / file.replace(".safetensors", ".fp16.safetensors"), half)
        (hub.repository / file).with_suffix(".bin").write_bytes(b"large")
    (hub.repository / "v1-5-pruned.safetensors").write_bytes(b"large")
    monkeypatch.setattr("minidrag.weights.hub.snapshot_download", hub.snapshot_download)
    return hub


def test_only_needed_files_are_downloaded_and_only_once(hub: Hub, expected: Tensors) -> None:
    for source in (None, "sd15", weights.DEFAULT):
        model = load_model(source, device="cpu")
        assert checkpoints.same(checkpoints.outputs(model), expected)
    assert hub.requests == [(weights.DEFAULT, SMALL_FILES | files(""))]
    assert model.source == weights.DEFAULT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_dtypes_download_the_fp16_files(hub: Hub, dtype: torch.dtype) -> None:
    assert load_model("owner/name", device="cpu", dtype=dtype).dtype == dtype
    assert hub.requests == [("owner/name", SMALL_FILES | files(".fp16"))]


def test_a_repository_with_one_variant_of_each_network(hub: Hub) -> None:
    """If the preferred variant of a file is missing, only that file is downloaded in the other."""
    (hub.repository / checkpoints.FILES["unet"]).unlink()
    load_model("owner/name", device="cpu")
    second = {name for name in hub.requests[1][1] if name.endswith("safetensors")}
    assert second == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    hub.online = False
    load_model("owner/name", device="cpu")


def test_a_vae_from_the_hub(hub: Hub, clean: Path, expected: Tensors) -> None:
    shutil.rmtree(hub.repository)
    shutil.copytree(clean / "vae", hub.repository)
    model = load_model(clean, vae="stabilityai/sd-vae-ft-mse", device="cpu")
    assert checkpoints.same(checkpoints.outputs(model), expected)
    name, patterns = hub.requests[0]
    assert name == "stabilityai/sd-vae-ft-mse"
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= patterns


def test_the_vae_of_a_repository_is_not_downloaded_if_another_is_given(hub: Hub, clean: Path) -> None:
    load_model("owner/name", vae=clean, device="cpu")
    assert not any(file.startswith("vae") for _, patterns in hub.requests for file in patterns)


def test_no_network_and_an_empty_cache(hub: Hub) -> None:
    hub.online = False
    with pytest.raises(FileNotFoundError) as caught:
        load_model(device="cpu")
    message = str(caught.value)
    assert "\n" not in message and "Name or service not known" in message and weights.DEFAULT in message
    assert "unet/diffusion_pytorch_model.safetensors" in message and "hf download" in message


def test_no_network_and_a_file_missing_from_the_cache(hub: Hub) -> None:
    load_model(device="cpu")
    hub.online = False
    (hub.cache / "tokenizer/merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"^tokenizer/merges\.txt of .* not in the cache"):
        load_model(device="cpu")


def test_the_suggested_command_downloads_only_what_is_needed(hub: Hub) -> None:
    hub.online = False
    with pytest.raises(FileNotFoundError) as caught:
        load_model("owner/name", device="cpu")
    command = str(caught.value).split("`")[1]
    patterns = re.findall(r"--include '([^']+)'", command)
    files = [file for file in hub.repository.rglob("*") if file.is_file()]
    chosen = {file for file in files for pattern in patterns if fnmatch(hub.name(file), pattern)}
    copy = hub.cache.with_name("copy")
    for file in chosen:
        target = copy / file.relative_to(hub.repository)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    assert {file.name for file in chosen if file.suffix not in (".json", ".txt")} == {
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
    }
    assert command.startswith("hf download owner/name --include ") and load_model(copy, device="cpu")


def test_shards_on_the_hub(hub: Hub, expected: Tensors) -> None:
    """The index says which files to download."""
    for file in checkpoints.FILES.values():
        split(hub.repository / file)
    assert checkpoints.same(checkpoints.outputs(load_model("owner/name", device="cpu")), expected)
    assert {name for name in hub.requests[1][1] if "vae" in name} == {
        f"vae/diffusion_pytorch_model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)
    }
    hub.online = False
    load_model("owner/name", device="cpu")
    (hub.cache / "vae/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="^vae/diffusion_pytorch_model-00002-of-00003"):
        load_model("owner/name", device="cpu")
    hub.online = True
    load_model("owner/name", device="cpu")


def test_an_index_on_the_hub_that_leads_elsewhere(hub: Hub) -> None:
    index = split(hub.repository / checkpoints.FILES["unet"])
    index.write_text('{"weight_map": {"conv_in.weight": "../../x.safetensors"}}')
    with pytest.raises(ValueError, match="names a shard"):
        load_model("owner/name", device="cpu")


def test_a_tokenizer_on_the_hub_as_saved_today(hub: Hub, expected: Tensors) -> None:
    tokenizer = CLIPTokenizerFast.from_pretrained(hub.repository / "tokenizer")
    shutil.rmtree(hub.repository / "tokenizer")
    tokenizer.save_pretrained(hub.repository / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (hub.repository / "tokenizer" / name).unlink(missing_ok=True)
    assert checkpoints.same(checkpoints.outputs(load_model("owner/name", device="cpu")), expected)


def test_a_single_file_without_a_tokenizer_and_without_a_network(
    hub: Hub, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SINGLE_FILE", checkpoints.SMALL)
    hub.online = False
    file = checkpoints.write(tmp_path / "alone/x.safetensors", checkpoints.emaonly(checkpoints.read(clean)))
    with pytest.raises(FileNotFoundError) as caught:
        load_model(file, device="cpu")
    message = str(caught.value)
    assert "give a folder with one as --tokenizer" in message and "--include 'tokenizer/*'" in message
    assert load_model(file, tokenizer=clean, device="cpu").tokenizer("a").shape == (1, 77)


def test_a_repository_of_pickles(hub: Hub) -> None:
    for file in hub.repository.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no unet/.*python -m weights_convert safetensors"):
        load_model("owner/name", device="cpu")


def test_unknown_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("minidrag.weights.hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"model owner/name was not found on the hub"):
        load_model("owner/name", device="cpu")


def test_the_real_cache_layout_without_a_network(
    clean: Path, expected: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use the folders of huggingface_hub; any connection fails the test."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    commit = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    shutil.copytree(clean, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    assert checkpoints.same(checkpoints.outputs(load_model(device="cpu")), expected)


def test_offline_mode_with_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"not in the cache and the hub is unreachable") as caught:
        load_model(device="cpu")
    assert "\n" not in str(caught.value)
