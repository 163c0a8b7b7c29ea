"""Model files from the Hugging Face hub: only those needed, and from the local cache if it has them."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import RepositoryNotFoundError

# Downloaded if the repository has them; the first names SD 2.x's pad token.
OPTIONAL = [
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
]


def fetch(repository: str, needed: list[str], stems: list[str], infixes: tuple[str, ...]) -> Path:
    """Return a folder with the files `needed` and the weights; download those that the cache lacks.

    stems: weight files without suffix. infixes: acceptable variants, "" or ".fp16", preferred first.
    A model that is in the cache is loaded without network access.
    Raises ValueError for an unknown repository, FileNotFoundError, with their names, for missing files.
    """
    missing: list[str] = []
    problem: Exception | None = None
    for infix in infixes:
        for cached in (True, False):
            wanted = needed + [f"{stem}{infix}.safetensors" for stem in stems]
            try:
                folder = snapshot_download(
                    repository, allow_patterns=wanted + OPTIONAL, local_files_only=cached
                )
            except Exception as error:  # without a network, releases of huggingface_hub raise different ones
                problem, missing = error, missing or wanted
                continue
            problem = None
            missing = [name for name in wanted if not (Path(folder) / name).is_file()]
            if not missing:
                return Path(folder)
            stems = [stem for stem in stems if f"{stem}{infix}.safetensors" in missing]
    raise failure(repository, missing, problem)


def failure(repository: str, missing: list[str], problem: Exception | None) -> Exception:
    """The error for missing files; problem: raised by the hub, if it could not be reached."""
    if isinstance(problem, RepositoryNotFoundError):
        return ValueError(
            f"model {repository} was not found on the hub: check the spelling; for a private or gated one, "
            "run `hf auth login` first"
        )
    names = ", ".join(missing)
    if problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        return FileNotFoundError(
            f"{names} of {repository} are not in the cache and the hub is unreachable ({reason}): go online "
            f"once, or run `hf download {repository}` elsewhere and give the folder"
        )
    return FileNotFoundError(
        f"{repository} has no {names}: if it has .bin or .ckpt files, download them with "
        f"`hf download {repository}`, convert them with `python -m weights_convert safetensors FOLDER OUT` "
        "and give OUT"
    )
