"""Command line of weights_convert."""

import argparse
import sys
from pathlib import Path

from minidrag.system import console
from minidrag.weights import lora_file
from weights_convert.check import check, read_lora
from weights_convert.convert import to_folder, to_half, to_safetensors
from weights_convert.files import save, written_whole

EXAMPLES = """examples:
  python -m weights_convert check v1-5-pruned.safetensors
  python -m weights_convert folder v1-5-pruned.safetensors sd15 --tokenizer other-model/tokenizer
  python -m weights_convert safetensors model-with-bin-files model
  python -m weights_convert safetensors anything.ckpt anything.safetensors
  python -m weights_convert half sd15 sd15-half
  python -m weights_convert lora lora.safetensors pytorch_lora_weights.safetensors --to peft

Existing files are never overwritten, and a failed conversion leaves nothing behind.
Exit status: 0 success; 1 check found that minidrag cannot load SOURCE; 2 error."""


def parser() -> argparse.ArgumentParser:
    top = console.Parser(
        console.program("weights_convert", "minidrag"),
        description="Convert model files to the layout that minidrag loads, or check them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, source: str, out: str | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.add_argument("source", type=Path, metavar="SOURCE", help=source)
        if out:
            added.add_argument("out", type=Path, metavar="OUT", help=f"{out} to write; must not exist")
        return added

    command("check", "describe a file or folder and check that minidrag can load it", "file or folder")
    folder = command(
        "folder", "convert an SD 1.x checkpoint file to a model folder", ".safetensors file", "folder"
    )
    tokenizer = "folder with vocab.json and merges.txt (default: SOURCE's folder or its subfolder tokenizer)"
    folder.add_argument("--tokenizer", type=Path, metavar="FOLDER", help=tokenizer)
    pickles = ".bin, .ckpt, .pt or .pth file, or model folder"
    command("safetensors", "convert pickles to safetensors without running code", pickles, "file or folder")
    floats = ".safetensors file or model folder"
    command("half", "convert float32 weights to float16", floats, "file or folder")
    lora = command("lora", "convert a LoRA file to another key format", "SD 1.x LoRA", ".safetensors file")
    lora.add_argument(
        "--to", choices=list(lora_file.STYLES), required=True, help="peft: written by current diffusers"
    )
    return top


def run(options: argparse.Namespace) -> int:
    if options.command == "check":
        return report(options.source)
    if options.command == "folder":
        if not to_folder(options.source, options.out, options.tokenizer):
            print(f"no tokenizer found: put vocab.json and merges.txt into {options.out / 'tokenizer'}")
    elif options.command == "safetensors":
        to_safetensors(options.source, options.out)
    elif options.command == "half":
        to_half(options.source, options.out)
    elif options.command == "lora":
        tensors = lora_file.to_keys(read_lora(options.source), options.to)
        with written_whole(options.out) as file:
            save(tensors, file)
    print(f"wrote {options.out}")
    return 0


def report(source: Path) -> int:
    try:
        for line in check(source):
            print(line)
    except (OSError, ValueError) as error:
        print(f"minidrag cannot load it: {console.one_line(console.reason(error))}")
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    return console.command(lambda: run(parser().parse_args(arguments)), stopped="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
