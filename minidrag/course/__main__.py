"""`python -m minidrag.course SUBCOMMAND`: the commands of the course.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status; the first line
of its docstring is its help.
"""

import sys

from minidrag.system import console

SUBCOMMANDS = {
    "report": "minidrag.course.report",
    "figures": "minidrag.course.experiments",
    "new": "minidrag.course.catalog",
    "check": "minidrag.course.check",
    "slips": "minidrag.course.slips",
}


def build_parser() -> console.Parser:
    program = console.program("minidrag.course", "minidrag course")
    parser = console.Parser(prog=program, description="Teach minidrag.")
    console.add_subcommands(parser, SUBCOMMANDS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    def job() -> int:
        args = build_parser().parse_args(arguments)
        return args.run(args)

    return console.command(job, "close other programs", "what was written stays")


if __name__ == "__main__":
    sys.exit(main())
