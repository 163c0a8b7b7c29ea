"""`python -m minidrag.bench SUBCOMMAND`: one subcommand per kind of measurement.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status; the first line
of its docstring is its help. Such modules import the libraries that they compare with inside `run`.
"""

import argparse
import importlib
import sys

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minidrag.bench", description="Measure minidrag.")
    chosen = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, path in SUBCOMMANDS.items():
        module = importlib.import_module(path)
        summary = (module.__doc__ or "").partition("\n")[0]
        command = chosen.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
