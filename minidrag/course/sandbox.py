"""Run students' code in another process, with a time limit, from a file that may hold anything.

This guards against accidents, not against malice: the code may do whatever the user may.
"""

import contextlib
import importlib.util
import io
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minidrag.course.exercise import Function, Unfit

if sys.platform == "linux":
    import resource

START = 120  # seconds that a process may take to start, which imports torch
LONGEST = 160  # characters of an error in a sentence
MEMORY = 8 * 2**30  # bytes that a process may allocate, so that a slip does not stop the whole machine


class Stopped(Exception):
    """A process that gave no result; the message is a sentence."""


def context() -> Any:
    """Processes that begin with torch imported, where the system has them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["minidrag.course.judge"])
    return forkserver


def in_process(job: Callable[..., Any], *arguments: Any, limit: float) -> Any:
    """Call a function of a module in a new process and return what it returns.

    limit: in seconds. Raises Stopped for a process that takes longer or that ends by itself.
    """
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=serve, args=(theirs, job, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START):
            raise Stopped("the process did not start: try again")
        ours.recv()
        if not ours.poll(limit):
            raise Stopped(f"it runs for more than {limit:g} seconds: does a loop never end?")
        return ours.recv()
    except EOFError:
        process.join(5)
        raise Stopped(ended(process.exitcode or 0)) from None
    finally:
        process.kill()
        process.join()


def ended(code: int) -> str:
    """A sentence on a process that is gone. code: its exit status; negative: the signal that ended it."""
    if code >= 0:
        return "it ends the whole Python process: leave out os._exit and the like"
    return f"its process was ended by {signal.Signals(-code).name}: does it crash, or use too much memory?"


def serve(pipe: Connection, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: run the job, with everything that it prints by any means thrown away."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(
            resource.RLIMIT_DATA, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard)
        )
    pipe.send("started")
    pipe.send(job(*arguments))


def load(path: Path, name: str) -> Function:
    """Load a function from a file; raises Unfit with a sentence."""
    if not path.is_file():
        raise Unfit(f"there is no file {path.name}: lay it out again with `python -m minidrag.course new`")
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with explained(path, "its file does not import"):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise Unfit(f"there is no function `{name}` in {path.name}: keep the name that the file had")
    return function


@contextlib.contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a student's code raises into Unfit with a sentence and the line.

    path: the file, or the folder of several files: then the sentence names the file too.
    """
    try:
        yield
    except Unfit:
        raise
    # BaseException: sys.exit() is one too. The process has this work alone to do.
    except BaseException as error:
        if isinstance(error, NotImplementedError) and not str(error):  # torch raises it with a message
            raise Unfit("not written yet") from None
        frames = [
            x for x in traceback.extract_tb(error.__traceback__) if Path(x.filename).is_relative_to(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        name = f"{Path(frames[-1].filename).name}, " if frames and path.is_dir() else ""
        where = f" ({name}line {line})" if line else ""
        reason = f"{type(error).__name__}: {message[:LONGEST]}".removesuffix(": ")
        raise Unfit(f"{what}: {reason}{where}") from None


@contextlib.contextmanager
def silent() -> Iterator[io.StringIO]:
    """Catch what is printed, without warnings: torch warns of code that is right too."""
    text = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        warnings.simplefilter("ignore")
        yield text
