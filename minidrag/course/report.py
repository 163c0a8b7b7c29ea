"""Explain one edit: its equations, the lines of code that computed them, and its figures, in one HTML file.

    python demo.py --report
    python -m minidrag.course report runs/image-1

The file opens without a network and prints as slides.
"""

import argparse
import json
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from minidrag import images
from minidrag.app import lora_cache
from minidrag.app.options import open_model, read_options
from minidrag.app.session import Session, generate_image, open_session
from minidrag.course.excerpt import to_html
from minidrag.course.mathml import mathml
from minidrag.course.replay import replay
from minidrag.course.sections import Section, Subject, sections
from minidrag.course.svg import figure, row
from minidrag.edit import Edit
from minidrag.method.progress import Progress
from minidrag.system.files import read_json, write_text

NAME = "report.html"
MARK = '<meta name="generator" content="minidrag">'  # a file without it was not written here
HERE = Path(__file__).parent
INTRODUCTION = (
    "DragDiffusion (arXiv 2306.14435) on one image, step by step. Each page has an equation, the lines of "
    "code that computed it, and what they did here. Answer the question before you unfold the figure."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a finished run of demo.py")
    parser.add_argument("--device", help="cpu, cuda, or mps (default: that of the run)")


def to_section(section: Section, number: int) -> str:
    formula = "".join(map(mathml, section.formula.splitlines()))
    code = "".join(map(to_html, section.code))
    opening = f'<div class="opening">{section.opening}</div>' if section.opening else ""
    fold = f'<div class="fold">{section.figure}<p class="answer">{section.answer}</p></div>'
    return (
        f'<section id="{section.name}"><h2><span class="number">{number}</span>{section.title}</h2>'
        f'<div><p class="lead">{section.lead}</p>{formula}{code}</div>'
        f"<div>{opening}<details><summary>{section.question}</summary>{fold}</details></div></section>"
    )


def page(subject: Subject) -> str:
    """The whole file."""
    parts = sections(subject)
    links = "".join(f'<a href="#{part.name}">{n}. {part.title}</a>' for n, part in enumerate(parts, 1))
    body = "".join(to_section(part, number) for number, part in enumerate(parts, 1))
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    edit = images.resize(subject.edit.image, subject.size)
    hero = figure(subject.original, "before"), figure(edit, "after")
    title = " ".join(["How this image was dragged:", escape(subject.prompt)]).rstrip(": ")
    made = ", ".join(f"{name} {version}" for name, version in lora_cache.versions().items())
    about = f'<p class="made">Model {escape(subject.model)}; {escape(made)}.</p>'
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{MARK}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body>"
        f"<header><h1>How this image was dragged</h1><p>{INTRODUCTION}</p>"
        f'<div class="hero">{row(*hero)}</div>{about}<nav>{links}</nav>'
        f"<p><button>Show all figures</button></p></header><main>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def write(folder: Path, session: Session, edit: Edit) -> Path:
    """Write the report of an edit into a folder. Raises ValueError for a file there that is not a report."""
    file = folder / NAME
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{file} is not a report: move it away")
    options = session.options
    values = replay(session.model, edit, options.prompt)
    mask = None if session.mask is None else edit.window.crop_mask(session.mask)
    results = {name: edit.window.crop(getattr(edit, name)) for name in ("image", "raw", "reconstruction")}
    inside = replace(edit, **results)  # of the window, which is all that the method sees
    subject = Subject(session.part, mask, options.prompt, options.model, inside, values)
    write_text(file, page(subject))
    return file


def attempt(folder: Path, session: Session, edit: Edit) -> str:
    """Write the report of an edit whose results are written; return a sentence on how that went."""
    began = time.perf_counter()
    try:
        file = write(folder, session, edit)
        size = file.stat().st_size / 1e6
    except KeyboardInterrupt:
        return "note: the report was stopped; the results are complete"
    except Exception as error:  # whatever it is, the edit is done
        return f"note: there is no report: {' '.join(str(error).split()) or type(error).__name__}"
    return f"report: {file.resolve()}, {size:.1f} MB in {time.perf_counter() - began:.1f} s"


def run(args: argparse.Namespace) -> int:
    """Repeat a finished run with its own LoRA and write its report."""
    base = args.folder / "run.json"
    file = args.folder / "lora.safetensors"
    values: dict[str, Any] = {"base": base}
    if file.exists():
        values["lora"] = file
    if args.device:
        values["device"] = args.device
    options = read_options(values)
    model = open_model(options)
    progress = Progress()
    generated = None if options.image else generate_image(model, options, progress)
    session = open_session(model, options, progress, generated)
    edit = session.edit()
    report = write(args.folder, session, edit)
    before = read_json(base).get("result", {})
    same = before.get("paths") == json.loads(json.dumps(edit.paths))
    note = "" if same else "; the handles' paths differ from run.json: other versions or device"
    print(f"wrote {report}{note}")
    return 0
