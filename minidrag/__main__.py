"""The command `minidrag`: one edit, or a subcommand. PyTorch is imported only by what needs it."""

import sys
from collections.abc import Sequence
from importlib import import_module

from minidrag.system import console

COMMANDS = {
    "page": "minidrag.page.serve",
    "course": "minidrag.course.__main__",
    "bench": "minidrag.bench.__main__",
    "check": "weights_convert.__main__",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, 2 for what cannot be done, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--page" in words:
        words = ["page", *words]
    name = words[0] if words else ""
    if name == "check":
        return console.command(lambda: import_module(COMMANDS[name]).main(words))
    if name in COMMANDS:
        return import_module(COMMANDS[name]).main(words[1:])
    return import_module("minidrag.app.command_line").main(words)


if __name__ == "__main__":
    sys.exit(main())
