"""Reading regular files and strict JSON, checksums, and writing files whole or not at all."""

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LINK = r"(?i)[a-z]{2,}:/"  # C:/ is a drive
MAX_JSON = 20_000_000  # bytes; a run.json has some thousands
PART = f".part-{platform.node()}-"  # prefix of this machine's unfinished files; the process's id follows


def check_regular(path: Path, most: int | None = None) -> Path:
    """Return a path if it is a regular file of at most `most` bytes; raise ValueError if not.

    Reading a pipe might never begin, and a device such as /dev/zero never end.
    """
    if re.match(LINK, str(path)):  # Path made one slash of two
        raise ValueError(f"{path} is a link: download it first, and give the file")
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte, or text that no file name can have
        reason = getattr(error, "strerror", None) or "no file can have this name"
        raise ValueError(f"{shorten(str(path))} cannot be opened: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ValueError(f"{path} is {kind}: give a file")
    if most is not None and status.st_size > most:
        size = f"{status.st_size:,} bytes, at most {most:,} are expected"
        raise ValueError(f"{path} has {size}: is it the right file?")
    return path


def read_json(path: Path) -> Any:
    """Read JSON in UTF-8; raise ValueError, one sentence, for anything that is not strictly JSON."""
    return parse_json(check_regular(path, MAX_JSON).read_bytes(), str(path))


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON. name: of its source, for the error."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=to_object, parse_constant=reject_constant)
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeDecodeError:
        reason = "it is not text in UTF-8"
    except json.JSONDecodeError as error:
        reason = f"it is not valid JSON ({error})"
    except ValueError as error:
        long = "integer string conversion" in str(error)  # Python's words for thousands of digits
        reason = "a number in it is too long" if long else str(error)
    raise ValueError(f"{name} cannot be read as JSON: {reason}")


def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of the pairs of a JSON object; raise ValueError for a repeated key."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(repeated)} is there more than once")
    return values


def reject_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not valid JSON")


def shorten(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def write_whole(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer` fill a temporary file beside `path`, then rename it: all of it is there or nothing.

    The temporary name has the suffix of `path`, for writers that pick a format by it. Raises OSError, which
    names `path`.
    """
    temporary = path.with_name(f"{PART}{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        writer(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file of text in UTF-8."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Any) -> None:
    """Write a whole file of JSON."""
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def reserve(folder: Path, settings: str, option: str) -> Path:
    """Make a folder for the results of some settings, JSON, which settings.json records; return it.

    option: of the command, that names the folder. Raises ValueError if it has other files, or results of
    other settings.
    """
    file = folder / "settings.json"
    # Listed first: a process beside this one may write the settings in between.
    others = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if os.path.lexists(file):
        if check_regular(file).read_bytes() != settings.encode():
            raise ValueError(f"{file} has other settings: give another {option}, or delete the folder")
    elif others:
        raise ValueError(f"{folder} has files that are not results of this command: give another {option}")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    write_text(file, settings)
    return folder


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder in `folder` for unfinished files, and remove it with what is still in it.

    Also removes what killed processes of this machine left there.
    """
    sweep(folder)
    part = part_of(folder)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def part_of(folder: Path) -> Path:
    """Make a hidden folder for unfinished files, which `sweep` removes if this process is killed."""
    return Path(tempfile.mkdtemp(prefix=f"{PART}{os.getpid()}-", dir=folder))


def sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left unfinished in a folder."""
    for path in folder.glob(f"{PART}*"):
        process = path.name.removeprefix(PART).partition("-")[0]
        if process.isdigit() and not is_running(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """True if the process is running, or if that is unknown."""
    if os.name != "posix":  # elsewhere os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        pass
    return True
