"""Lines of the project's own source, quoted with file and line."""

import inspect
import textwrap
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import minidrag

ROOT = Path(minidrag.__file__).parents[1]


class Excerpt(NamedTuple):
    """Whole lines of a file."""

    file: str  # from the folder that holds the package
    line: int  # of the first, from 1
    lines: list[str]


def excerpt(function: Callable[..., Any], first: str, last: str) -> Excerpt:
    """Lines of a function, from the first that holds a text to the next that holds another.

    Raises ValueError if there are no such lines: the code has changed and the quotation must too.
    """
    bare = inspect.unwrap(function)  # without torch.no_grad around it
    lines, number = inspect.getsourcelines(bare)
    file = Path(inspect.getsourcefile(bare) or "").relative_to(ROOT).as_posix()
    start = next((i for i, line in enumerate(lines) if first in line), None)
    end = next((i for i, line in enumerate(lines) if last in line and start is not None and i >= start), None)
    if start is None or end is None:
        raise ValueError(f"{file} has no lines from {first!r} to {last!r} in {function.__name__}")
    return Excerpt(file, number + start, [line.rstrip("\n") for line in lines[start : end + 1]])


def to_html(part: Excerpt) -> str:
    """A figure with the lines, without their common indentation, and where they stand."""
    code = escape(textwrap.dedent("\n".join(part.lines)), quote=False)
    return f'<figure class="code"><figcaption>{part.file}:{part.line}</figcaption><pre>{code}</pre></figure>'
