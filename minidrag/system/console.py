"""The console of all commands: printing never fails a run, and an error is one sentence."""

import argparse
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from safetensors import SafetensorError

MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in PyTorch's errors, any device
MAX_LENGTH = 1000  # characters of a message: a name in it can have millions
SHORT_OF_MEMORY = "close other programs, or use a computer with more"


class Parser(argparse.ArgumentParser):
    """ArgumentParser that takes whole names alone and raises ValueError, one sentence, for a mistake."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}{self.hint()} (--help lists all options)")

    def hint(self) -> str:
        """Hint for the first word that was taken for an option and is not one."""
        for before, word in pairwise(["", *self.words]):
            if re.match(r"-(?!-|h$|\d+$|\d*\.\d+$|$)\S*$", word):
                return (
                    f": write {before}={word}" if before.startswith("--") else f": write ./{word} for a file"
                )
        return ""


def program(module: str, command: str) -> str:
    """The words that started a command, for its usage: `python -m module`, or its installed name."""
    return f"python -m {module}" if Path(sys.argv[0]).name == "__main__.py" else command


def add_subcommands(parser: argparse.ArgumentParser, modules: Mapping[str, str]) -> None:
    """Add a subcommand per module, which has `add_arguments(parser)`, `run(args)`, and a line of help."""
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, path in modules.items():
        module = importlib.import_module(path)
        summary = (module.__doc__ or "").partition("\n")[0]
        command = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)


class Stream:
    """A text stream that a closed pipe or a full disk silences: neither must fail a run."""

    def __init__(self, stream: TextIO):
        self.stream: Any = stream
        with suppress(AttributeError):  # not a file
            self.stream.reconfigure(errors="backslashreplace")  # what the console's encoding lacks

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # else Python would fail to write the rest at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printing() -> Iterator[None]:
    """Let nothing that is printed fail within a context, and let no other library print warnings."""
    streams = sys.stdout, sys.stderr
    disabled = logging.root.manager.disable
    sys.stdout, sys.stderr = (cast(TextIO, Stream(stream)) for stream in streams)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
                logging.disable(logging.ERROR)
            yield
    finally:
        sys.stdout, sys.stderr = streams
        logging.disable(disabled)


def command(
    job: Callable[[], int | None], memory: str = SHORT_OF_MEMORY, stopped: str = "nothing was finished"
) -> int:
    """Run a job; return its exit status: 2, with one sentence, for what cannot be done, and 130 for Ctrl-C.

    memory: advice when it runs out. stopped: what remains after Ctrl-C, unless the interrupt says it.
    """
    with printing():
        try:
            return job() or 0
        except KeyboardInterrupt as stop:
            return fail(f"stopped: {str(stop) or stopped}", 130)
        except (OSError, ValueError, FloatingPointError, SafetensorError) as error:
            return fail(reason(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return fail(f"out of memory: {memory}")


def reason(error: BaseException) -> str:
    """Message of an error, for a person."""
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return "it was stopped" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors that Python, NumPy, and PyTorch's allocators raise when memory runs out."""
    if isinstance(error, RuntimeError):
        return any(words in str(error).lower() for words in MEMORY)
    return isinstance(error, MemoryError)


def fail(message: str, status: int = 2) -> int:
    print("minidrag:", one_line(message), file=sys.stderr)
    return status


def one_line(message: str) -> str:
    """Put a message in one line; omit the middle of a very long one."""
    text = " ".join(message.split())
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"
