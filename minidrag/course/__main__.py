"""`python -m minidrag.course SUBCOMMAND`: the commands of the course.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status; the first line
of its docstring is its help.
"""

import argparse
import importlib
import sys

from minidrag import console

SUBCOMMANDS = {
    "report": "minidrag.course.report",
    "figures": "minidrag.course.figures",
    "new": "minidrag.course.new",
    "check": "minidrag.course.check",
    "slips": "minidrag.course.slips",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minidrag.course", description="Teach minidrag.")
    chosen = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, path in SUBCOMMANDS.items():
        module = importlib.import_module(path)
        summary = (module.__doc__ or "").partition("\n")[0]
        command = chosen.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    def job() -> int:
        args = build_parser().parse_args(arguments)
        return args.run(args)

    return console.command(job, "close other programs")


if __name__ == "__main__":
    sys.exit(main())
