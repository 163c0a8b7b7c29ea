"""Lay out the exercises in a folder, without touching files that are there.

python -m minidrag.course new FOLDER
"""

import argparse
from pathlib import Path

from minidrag.course.catalog import EXERCISES, STUBS, file_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made if it does not exist")


def lay_out(folder: Path) -> list[str]:
    """Copy the stubs that the folder does not have; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in map(file_name, range(1, len(EXERCISES) + 1)):
        text = (STUBS / name).read_bytes()
        try:
            with (folder / name).open("xb") as file:
                file.write(text)
            made.append(name)
        except FileExistsError:
            continue
    return made


def run(args: argparse.Namespace) -> int:
    made = lay_out(args.folder)
    kept = len(EXERCISES) - len(made)
    print(
        f"{args.folder}: {len(made)} exercises laid out"
        + (f", {kept} were there and are kept" if kept else "")
    )
    print(f"Write the first, then: python -m minidrag.course check {args.folder} 1")
    return 0
