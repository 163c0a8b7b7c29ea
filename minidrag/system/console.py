"""The console of all commands: printing never fails a run, and an error is one sentence."""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from safetensors import SafetensorError

MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # in PyTorch's errors, any device
LONGEST = 1000  # characters of a message: a name in it can have millions
SHORT_OF_MEMORY = "close other programs, or use a computer with more"


class Parser(argparse.ArgumentParser):
    """ArgumentParser that complains in one sentence, without its usage."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(fail(f"{message} (--help lists all options)"))


def add_subcommands(parser: argparse.ArgumentParser, modules: Mapping[str, str]) -> None:
    """Add a subcommand per module, which has `add_arguments(parser)`, `run(args)`, and a line of help."""
    chosen = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, path in modules.items():
        module = importlib.import_module(path)
        summary = (module.__doc__ or "").partition("\n")[0]
        command = chosen.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)


class Stream:
    """A text stream that drops what cannot be written: a closed pipe or a full disk must not fail a run."""

    def __init__(self, stream: TextIO | None):
        self.stream: Any = stream or open(os.devnull, "w")  # noqa: SIM115, None: it was closed from the start
        with suppress(AttributeError, OSError, ValueError):  # not a file, or closed
            self.stream.reconfigure(errors="backslashreplace")  # what the console's encoding lacks

    def write(self, text: str) -> int:
        self.attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, name: str, *arguments: str) -> None:
        try:
            getattr(self.stream, name)(*arguments)
        except OSError:
            with suppress(OSError, ValueError):  # else Python fails to write the rest of it at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except ValueError:  # it is closed, or cannot encode the text
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printing() -> Iterator[None]:
    """Let nothing that is printed fail within a context, and let no other library print warnings."""
    fill_descriptors()
    before, disabled = (sys.stdout, sys.stderr), logging.root.manager.disable
    streams: Any = [Stream(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
                logging.disable(logging.ERROR)
            yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before
        logging.disable(disabled)


def fill_descriptors() -> None:
    """Give closed standard streams a place, which else the next file that is opened would get.

    Libraries write to the number of the standard error, or redirect it, whatever is there.
    """
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)


def command(
    job: Callable[[], int | None], memory: str = SHORT_OF_MEMORY, stopped: str = "nothing was finished"
) -> int:
    """Run a job; return its exit status, 2 for what cannot be done, 130 for Ctrl-C, each with one sentence.

    memory: what needs less of it. stopped: what is left after Ctrl-C, unless the interrupt says it.
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
    """True for the errors by which Python, NumPy, and PyTorch's allocators say that memory is used up."""
    told = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MEMORY)
    return isinstance(error, MemoryError) or told


def fail(message: str, status: int = 2) -> int:
    print("minidrag:", one_line(message), file=sys.stderr)
    return status


def one_line(message: str) -> str:
    """A message in one line, without the middle of a very long one."""
    text = " ".join(message.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
