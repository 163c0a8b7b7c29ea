"""Opening files that people name: regular ones of a sensible size, and JSON that can be trusted."""

import json
import os
import pickle
import platform
import re
import shutil
import stat
import struct
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LINK = r"(?i)[a-z]{2,}:/"  # C:/ is a drive
MAX_JSON = 20_000_000  # bytes; a run.json has some thousands
PART = f".part-{platform.node()}-"  # of unfinished files and folders of this machine, before the process's id


def regular(path: Path, most: int | None = None) -> Path:
    """Return a path if it is a regular file of at most `most` bytes; raise ValueError if not.

    A pipe would be waited for without end, and a device such as /dev/zero read without end.
    """
    if re.match(LINK, str(path)):  # Path made one slash of two
        raise ValueError(f"{path} is a link: download it first, and give the file")
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte, or text that no file name can have
        reason = getattr(error, "strerror", None) or "no file can have this name"
        raise ValueError(f"{shorten(str(path))} cannot be opened: {reason}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise ValueError(f"{path} is {kind}: give a file")
    if most is not None and found.st_size > most:
        raise ValueError(
            f"{path} has {found.st_size:,} bytes, more than {most:,}: it is not what it should be"
        )
    return path


def read_json(path: Path) -> Any:
    """Read JSON in UTF-8; raise ValueError, one sentence, for anything that is not strictly JSON."""
    return parse_json(regular(path, MAX_JSON).read_bytes(), str(path))


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON; name: of its place, for the error."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=without_repetition, parse_constant=refuse)
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


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(twice)} is there more than once")
    return values


class SparingUnpickler(pickle._Unpickler):
    """Unpickler that takes no more memory than the file has; the one in C takes what the file asks for."""

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(bytearray(self.read(count)))  # type: ignore[attr-defined]

    dispatch: dict[int, Any] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


def refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number of JSON")


def shorten(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def part_of(folder: Path) -> Path:
    """Make a hidden folder for unfinished files, which `sweep` removes if this process is killed."""
    return Path(tempfile.mkdtemp(prefix=f"{PART}{os.getpid()}-", dir=folder))


def sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left unfinished in a folder."""
    for path in folder.glob(".part-*"):
        number = path.name.removeprefix(PART).partition("-")[0]
        if path.name.startswith(PART) and number.isdigit() and not lives(int(number)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def lives(process: int) -> bool:
    """True if a process is running, or if that cannot be told."""
    if os.name != "posix":  # elsewhere os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        pass
    return True


def write_whole(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer` fill a temporary file beside `path`, then rename it: all of it is there or nothing.

    The temporary name has the suffix of `path`, for writers that pick a format by it.
    """
    owner = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f"{PART}{owner}-{path.name}")
    try:
        writer(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
