"""`python -m minidrag.bench SUBCOMMAND`: one subcommand per kind of measurement.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status; the first line
of its docstring is its help.
"""

import sys

from minidrag.system import console

SUBCOMMANDS = {
    "networks": "minidrag.bench.networks",
    "memory": "minidrag.bench.memory",
    "scenes": "minidrag.bench.scenes",
    "speed": "minidrag.bench.speed",
    "dragbench": "minidrag.bench.dragbench",
    "ablate": "minidrag.bench.ablate",
    "features": "minidrag.bench.features",
    "tiny": "minidrag.bench.tiny",
}


LESS_MEMORY = {  # what needs less of it, by subcommand; of the others, settings of the edits
    "networks": "try --small or --dtype float16",
    "memory": "close other programs",
    "features": "try smaller images, or fewer --steps",
    "tiny": "close other programs",
}
RESUMED = ("scenes", "dragbench", "ablate")
EDITS = "try --set checkpointing=true lora_batch=1, or a smaller size"


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: that of the subcommand, 2 for what cannot be done, 130 for Ctrl-C."""
    program = console.program("minidrag.bench", "minidrag bench")
    parser = console.Parser(prog=program, description="Measure minidrag.")
    console.add_subcommands(parser, SUBCOMMANDS)
    with console.printing():
        try:
            args = parser.parse_args(arguments)
        except ValueError as error:
            return console.fail(str(error))
        memory = LESS_MEMORY.get(args.subcommand, EDITS)
        stopped = "the same command resumes" if args.subcommand in RESUMED else "nothing was finished"
        return console.command(lambda: args.run(args), memory, stopped)


if __name__ == "__main__":
    sys.exit(main())
