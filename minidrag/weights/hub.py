"""Model files from the Hugging Face hub: only those needed, and from the local cache if it has them."""

from itertools import product
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import RepositoryNotFoundError

from minidrag.weights.files import INDEX, read_index, weight_file

VOCABULARY = ["tokenizer/vocab.json", "tokenizer/merges.txt"]
WHOLE = "tokenizer/tokenizer.json"  # instead of the vocabulary, as transformers saves it today
# Downloaded if the repository has them; the second names SD 2.x's pad token.
OPTIONAL = [
    "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    WHOLE,
    "scheduler/scheduler_config.json",
]


def fetch(repository: str, needed: list[str], stems: list[str], infixes: tuple[str, ...]) -> Path:
    """Return a folder with the files `needed` and the weights; download those that the cache lacks.

    stems: weight files without suffix. infixes: acceptable variants, "" or ".fp16", preferred first.
    A model that is in the cache is loaded without network access.
    Raises ValueError for an unknown repository, FileNotFoundError, with their names, for missing files.
    """
    every = [*needed, *(f"{stem}{infixes[0]}.safetensors" for stem in stems)]
    missing: list[str] = every
    problem: Exception | None = None
    for infix, cached in product(infixes, (True, False)):
        folder = download_variant(repository, needed, stems, infix, cached)
        if isinstance(folder, Exception):
            problem = folder
            continue
        problem = None
        absent = lacking(folder, needed, stems, infix)
        if not absent:
            return folder
        if infix == infixes[0]:  # name the files of the preferred variant
            missing = absent
        stems = [stem for stem in stems if lacking(folder, [], [stem], infix)]
    raise failure(repository, missing, every, problem)


def download_variant(
    repository: str, needed: list[str], stems: list[str], infix: str, cached: bool
) -> Path | Exception:
    """Download the files that a repository has of one variant, from the cache alone if `cached`."""
    weights = [f"{stem}{infix}.safetensors" for stem in stems]
    indices = [f"{stem}{INDEX}{infix}.json" for stem in stems]
    folder = download(repository, [*needed, *weights, *indices, *OPTIONAL], cached)
    if isinstance(folder, Path) and (shards := shards_in(folder, stems, infix)):
        return download(repository, shards, cached)
    return folder


def download(repository: str, patterns: list[str], cached: bool) -> Path | Exception:
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=cached))
    except Exception as error:  # without a network, releases of huggingface_hub raise different ones
        return error


def shards_in(folder: Path, stems: list[str], infix: str) -> list[str]:
    """Return the shards in all indices of a folder, as paths from there."""
    files = [weight_file(folder / stem, infix) for stem in stems]
    indices = [file for file in files if file and file.suffix == ".json"]
    return sorted({shard.relative_to(folder).as_posix() for i in indices for shard in read_index(i).values()})


def lacking(folder: Path, needed: list[str], stems: list[str], infix: str) -> list[str]:
    """Return the names of the files that are not in a folder."""
    missing = [name for name in needed if not (folder / name).is_file()]
    if (folder / WHOLE).is_file():
        missing = [name for name in missing if name not in VOCABULARY]
    absent = [stem for stem in stems if not weight_file(folder / stem, infix)]
    missing += [f"{stem}{infix}.safetensors" for stem in absent]
    return missing + [name for name in shards_in(folder, stems, infix) if not (folder / name).is_file()]


def failure(repository: str, missing: list[str], every: list[str], problem: Exception | None) -> Exception:
    """Make the error for missing files. problem: raised by the hub, if it could not be reached.

    every: all files that the model needs; without their names, the command in the message would download the
    whole repository, for SD 1.5 ten times as much.
    """
    if isinstance(problem, RepositoryNotFoundError):
        return ValueError(
            f"model {repository} was not found on the hub: check the spelling; for a private or gated one, "
            "run `hf auth login` first"
        )
    names = ", ".join(missing) if len(missing) < 4 else f"{missing[0]} and {len(missing) - 1} more files"
    if problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0][:100]
        return FileNotFoundError(
            f"{names} of {repository} are not in the cache and the hub is unreachable ({reason}): go online "
            f"once, or run `{command(repository, every)}` elsewhere and give the folder"
        )
    bins = [name.replace("safetensors", "bin").replace("der/model", "der/pytorch_model") for name in every]
    return FileNotFoundError(
        f"{repository} has no {names}: if it has .bin files, download them with "
        f"`{command(repository, bins)}`, convert them with "
        "`python -m weights_convert safetensors FOLDER OUT` and give OUT"
    )


def command(repository: str, files: list[str]) -> str:
    """Return a command that downloads the files to a folder, the small ones by a pattern."""
    weights = [name for name in files if name.endswith((".safetensors", ".bin"))]
    small = ["*.json", "*.txt"] if weights else sorted({f"{name.rpartition('/')[0]}/*" for name in files})
    patterns = " ".join(f"--include '{name}'" for name in [*weights, *small])
    return f"hf download {repository} {patterns} --local-dir FOLDER"
