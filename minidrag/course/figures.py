"""Make the figures of the lessons anew and print their numbers.

    python -m minidrag.course figures       # all of them
    python -m minidrag.course figures 3     # of lesson 3

Deterministic on one machine. A lesson takes less than two minutes on two cores.
"""

import argparse
import time
from pathlib import Path

from minidrag.course.experiments import EXPERIMENTS, Bench
from minidrag.system.files import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    choices = range(1, len(EXPERIMENTS) + 1)
    add("lessons", nargs="*", type=int, choices=choices, metavar="N", help="lessons (default: all)")
    add("--out", type=Path, default=Path("runs/lessons"), metavar="DIR", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    bench, names = Bench(), list(EXPERIMENTS)
    args.out.mkdir(parents=True, exist_ok=True)
    for number in args.lessons or range(1, len(names) + 1):
        name, began = names[number - 1], time.perf_counter()
        found = EXPERIMENTS[name](bench)
        file = args.out / f"{name}.png"
        write_whole(file, lambda path, found=found: found.figure.quantize(256).save(path, optimize=True))
        print(*found.lines, sep="\n")
        print(f"wrote {file} in {time.perf_counter() - began:.0f} s\n", flush=True)
    return 0
