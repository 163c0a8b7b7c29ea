"""The command line: `python -m weights_convert COMMAND ...`.

Exit codes: 0 done, 1 `check` found that minidrag cannot load it, 2 an error, told in a sentence.
"""

import argparse
import sys
from pathlib import Path

from minidrag import lora_file
from weights_convert.check import check, read_lora
from weights_convert.convert import to_folder, to_half, to_safetensors
from weights_convert.files import save, written_whole


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "python -m weights_convert", description="Bring model files into the form that minidrag loads."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    folder = commands.add_parser("folder", help="single-file checkpoint (SD 1.x) to a model folder")
    folder.add_argument("source", type=Path, metavar="FILE")
    folder.add_argument("out", type=Path, metavar="OUT")
    folder.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt")

    tensors = commands.add_parser(
        "safetensors", help=".bin, .ckpt or .pt, or a folder of them, to safetensors"
    )
    tensors.add_argument("source", type=Path, metavar="FILE_OR_FOLDER")
    tensors.add_argument("out", type=Path, metavar="OUT")

    half = commands.add_parser("half", help="float32 weights, a file or a folder, to float16")
    half.add_argument("source", type=Path, metavar="SRC")
    half.add_argument("out", type=Path, metavar="OUT")

    lora = commands.add_parser("lora", help="LoRA file of any spelling to another one")
    lora.add_argument("source", type=Path, metavar="FILE")
    lora.add_argument("out", type=Path, metavar="OUT")
    lora.add_argument("--to", choices=list(lora_file.STYLES), required=True)

    inspect = commands.add_parser("check", help="tell what a file or folder is and whether it loads")
    inspect.add_argument("source", type=Path, metavar="SOURCE")
    return top


def run(options: argparse.Namespace) -> None:
    if options.command == "folder":
        if not to_folder(options.source, options.out, options.tokenizer):
            print("No tokenizer was found: put vocab.json and merges.txt into its folder named tokenizer.")
    elif options.command == "safetensors":
        to_safetensors(options.source, options.out)
    elif options.command == "half":
        to_half(options.source, options.out)
    elif options.command == "lora":
        tensors = lora_file.spell(read_lora(options.source), options.to)
        with written_whole(options.out) as file:
            save(tensors, file)
    print(f"{options.out} written")


def report(source: Path) -> int:
    try:
        for line in check(source):
            print(line)
    except (OSError, ValueError) as error:
        print(f"minidrag cannot load it: {error}")
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "check":
        return report(options.source)
    try:
        run(options)
    except (OSError, ValueError) as error:
        print(f"weights_convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
