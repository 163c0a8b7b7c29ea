"""`python -m minidrag.course SUBCOMMAND`: one subcommand per thing to do in class.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status; the first line
of its docstring is its help.
"""

import argparse
import importlib
import sys

SUBCOMMANDS = {
    "new": "minidrag.course.new",
    "check": "minidrag.course.check",
    "slips": "minidrag.course.slips",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minidrag.course", description="Learn minidrag.")
    chosen = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, path in SUBCOMMANDS.items():
        module = importlib.import_module(path)
        summary = (module.__doc__ or "").partition("\n")[0]
        command = chosen.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"minidrag: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minidrag: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
