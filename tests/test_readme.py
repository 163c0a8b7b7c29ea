"""The READMEs stay true: code, names, commands, and constants in them are those of the project."""

import inspect
import pkgutil
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from minidrag import edit
from minidrag.app.command_line import build_parser
from minidrag.app.options import CONFIGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCH = (ROOT / "minidrag/bench/README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:.*&& )?(python .+?)(?: {2,}#.*)?$", README + BENCH, re.MULTILINE)
MODULES = sorted(
    {command.split()[2] for command in COMMANDS if command.startswith("python -m ")} - {"venv", "pytest"}
)


def rows(columns: int, first: str) -> list[list[str]]:
    """Rows, without the heading, of all tables whose heading begins with `first`."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        if lines[0][0] == first:
            assert all(len(line) == columns for line in lines)
            found += lines[2:]
    assert found, first
    return found


def test_drag_edit_is_quoted_from_the_code() -> None:
    source = inspect.getsource(edit.drag_edit)
    body = textwrap.dedent(source.rpartition('"""\n')[2])
    assert f"```python\n{body}```" in README


def test_every_function_that_the_paper_is_mapped_to_exists() -> None:
    for _, code in rows(2, "paper (arXiv 2306.14435)"):
        names = re.findall(r"`([\w.]+)`", code)
        assert names
        for name in names:
            assert callable(pkgutil.resolve_name(f"minidrag.{name}")), name


def test_every_preset_is_in_the_table() -> None:
    named = [name.strip("`") for name, *_ in rows(3, "`--config`")]
    assert named[0] == "the default" and sorted(named[1:]) == sorted(CONFIGS)


@pytest.mark.parametrize(("text", "folder"), [(README, ROOT), (BENCH, ROOT / "minidrag/bench")])
def test_files_that_are_named_exist(text: str, folder: Path) -> None:
    named = set(re.findall(r"`([\w/]+/[\w/]+\.(?:py|toml|json)|LICENSE)`", text))
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    for source in re.findall(r'<img src="(.+?)"', text):
        assert (folder / source).is_file(), source
    for target in re.findall(r"\]\((?!https?:)(.+?)\)", text):
        assert (folder / target).exists(), target


def test_demo_commands_have_options_that_exist() -> None:
    commands = [shlex.split(command)[2:] for command in COMMANDS if command.startswith("python demo.py")]
    assert len(commands) >= 5
    for options in commands:
        build_parser().parse_args(options)


@pytest.mark.parametrize("module", MODULES)
def test_modules_show_their_help(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    for name in (module, f"{module}.__main__"):  # imported by other tests, which runpy warns of
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        words = command.split()
        if words[:3] == ["python", "-m", module] and module in ("minidrag.bench", "weights_convert"):
            assert re.search(rf"\b{words[3]}\b", text), command


def test_the_python_example_calls_what_exists() -> None:
    example = next(text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import" in text)
    compile(example, "README.md", "exec")
    for line in re.findall(r"^from minidrag.*$", example, re.MULTILINE):
        exec(line, {})
    given = re.findall(r"(\w+)=", example)
    assert set(given) <= inspect.signature(edit.drag_edit).parameters.keys()
    assert "edit.image" in example and "image" in edit.Edit.__dataclass_fields__
