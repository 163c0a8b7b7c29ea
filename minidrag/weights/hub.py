"""Files of a model on the Hugging Face hub: only the needed ones, and from the cache where it has them."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import RepositoryNotFoundError

# Fetched where a repository has them; the first tells SD 2.x's padding.
OPTIONAL = [
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
]


def fetch(repository: str, needed: list[str], stems: list[str], infixes: tuple[str, ...]) -> Path:
    """Returns a folder with the files `needed` and the weights; downloads what the cache lacks of them.

    stems: weight files without their ends. infixes: the variants that will do, best first: "", ".fp16".
    What is cached is not asked for again, so that a model once fetched loads without a network.
    Raises ValueError where there is no such repository, FileNotFoundError, with names, for missing files.
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
            except Exception as error:  # without a network, the hub's releases differ in what they raise
                problem, missing = error, missing or wanted
                continue
            problem = None
            missing = [name for name in wanted if not (Path(folder) / name).is_file()]
            if not missing:
                return Path(folder)
            stems = [stem for stem in stems if f"{stem}{infix}.safetensors" in missing]
    raise failure(repository, missing, problem)


def failure(repository: str, missing: list[str], problem: Exception | None) -> Exception:
    """The error to raise for missing files; problem: why the hub gave no answer, if it gave none."""
    if isinstance(problem, RepositoryNotFoundError):
        return ValueError(
            f"the hub shows no model {repository}: check the spelling; a private one, or one with "
            "terms to accept, wants `hf auth login` first"
        )
    names = ", ".join(missing)
    if problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        return FileNotFoundError(
            f"{names} of {repository} are not in the cache and the hub does not answer "
            f"({reason}): "
            f"go online once, or run `hf download {repository}` elsewhere and give the folder with the files"
        )
    return FileNotFoundError(
        f"{repository} has no {names}: if it has .bin or .ckpt files, fetch them with "
        f"`hf download {repository}`, convert them with `python -m weights_convert safetensors FOLDER OUT` "
        "and give OUT"
    )
