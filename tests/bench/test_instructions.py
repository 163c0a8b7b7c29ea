"""DragBench's layout: both forms of a case, harmful pickles, and broken folders."""

import os
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dragbench import PAIRS, meta, set_meta, write_case

from minidrag.bench.instructions import find_cases, read_case


class Evil:
    """Runs a command when unpickled in the usual way."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def in_objects(evil: Evil) -> np.ndarray:
    array = np.empty((1, 1), object)
    array[0, 0] = evil
    return array


HIDDEN: dict[str, Callable[[Evil], Any]] = {
    "alone": lambda evil: evil,
    "under another key": lambda evil: meta(more=evil),
    "in a point": lambda evil: meta(points=[[20, 20], [30, evil]]),
    "in an array": lambda evil: meta(mask=in_objects(evil)),
    "as the prompt": lambda evil: meta(prompt=evil),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", HIDDEN)
def test_a_pickle_that_would_run_a_command_is_refused(where: str, protocol: int, tmp_path: Path) -> None:
    case, marker = write_case(tmp_path, "animals/a", PAIRS["animals/a"]), tmp_path / "ran"
    evil = pickle.dumps(HIDDEN[where](Evil(marker)), protocol)
    (case / "meta_data.pkl").write_bytes(evil)
    with pytest.raises(ValueError, match=rf"animals/a: .*{os.system.__module__}\.system|_codecs\.encode"):
        read_case(case)
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists(), "the pickle is harmless, and the test shows nothing"


@pytest.mark.parametrize(
    "name", ["builtins.eval", "numpy.load", "numpy.ndarray.tofile", "numpy.core.multiarray.scalar"]
)
def test_everything_but_the_parts_of_an_array_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    module, _, attribute = name.rpartition(".") if "ndarray." not in name else ("numpy", "", name[6:])
    text = [f"\x8c{chr(len(word))}{word}" for word in (module, attribute)]
    (case / "meta_data.pkl").write_bytes(b"\x80\x04" + "".join(text).encode("latin1") + b"\x93.")
    message = f"animals/a: cannot read meta_data.pkl: it refers to {name}, which may be harmful"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_case(case)


class Forged:
    """An array of objects at addresses of the attacker's choice; looking at one would crash."""

    def __reduce__(self) -> tuple:
        return np.ndarray, ((2, 2), "O", b"AAAAAAA\1" * 4)


@pytest.mark.parametrize("key", ["mask", "points", "prompt"])
def test_not_even_numpys_own_classes_are_called(key: str, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    set_meta(case, **{key: Forged()})
    with pytest.raises(ValueError, match="animals/a: "):
        read_case(case)


@pytest.mark.parametrize("spelling", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_masks_of_old_and_new_numpy(spelling: bytes, order: Any, dtype: Any, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"], (90, 70))
    mask = np.random.default_rng(0).integers(0, 2, (70, 90)).astype(dtype, order=order)
    mask[50, 40] = 1
    raw = pickle.dumps(meta(mask=mask, points=PAIRS["animals/a"]), 3)  # without frames: lengths may change
    changed = re.sub(rb"numpy\._?core", spelling, raw)
    assert spelling in changed
    (case / "meta_data.pkl").write_bytes(changed)
    assert np.array_equal(read_case(case).mask, mask > 0)


def test_both_layouts_have_the_same_contents(tmp_path: Path) -> None:
    write_case(tmp_path, "animals/a", PAIRS["animals/b"])
    write_case(tmp_path, "animals/b", PAIRS["animals/b"])
    one, other = (read_case(tmp_path / "animals" / name) for name in "ab")
    assert (one.handles, one.targets, one.prompt) == (other.handles, other.targets, other.prompt)
    assert one.handles == [(60, 60), (30, 90)] and one.targets == [(60, 68), (30, 90)]
    assert np.array_equal(one.mask, other.mask) and one.mask.sum() == 90 * 80
    assert one.name == "animals/a" and one.kind == "animals"
    assert one.lengths == [8, 0]


def test_an_empty_mask_makes_everything_editable(tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    set_meta(case, mask=np.zeros((128, 128), np.uint8))
    assert read_case(case).mask.all()


@pytest.mark.parametrize("start", [b"\x96", b"\x8e", b"\x8d", b"\x95", b"}r"])
def test_a_pickle_takes_no_more_memory_than_it_has(start: bytes, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    size = (2**28).to_bytes(4 if start == b"}r" else 8, "little")
    (case / "meta_data.pkl").write_bytes(b"\x80\x05" + start + size + b"x.")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="meta_data.pkl"):
            read_case(case)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def write_bytes(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda case: (case / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda case: (case / name).unlink()


def setting(**values: Any) -> Callable[[Path], object]:
    return lambda case: set_meta(case, **values)


TRUNCATED = pickle.dumps(meta())[:200]
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {  # damage, and words of the message
    "no image": (remove("original_image.png"), "there is no file .*original_image.png"),
    "text for an image": (write_bytes("original_image.png", b"hello"), "is not an image in a known format"),
    "no instruction": (remove("meta_data.pkl"), "meta_data.pkl or drag_instruction.json is missing"),
    "truncated pickle": (
        write_bytes("meta_data.pkl", pickle.dumps(meta())[:200]),
        "cannot read meta_data.pkl",
    ),
    "empty pickle": (write_bytes("meta_data.pkl", b""), "cannot read meta_data.pkl: it is damaged"),
    "bytes for a mask": (
        write_bytes("meta_data.pkl", pickle.dumps(meta(mask=b"\xff"))),
        "cannot read meta_data.pkl: it is damaged",
    ),
    "unknown operation": (write_bytes("meta_data.pkl", b"x."), "cannot read meta_data.pkl: it is damaged"),
    "broken JSON": (write_bytes("drag_instruction.json", b"{"), "drag_instruction.json.* not valid JSON"),
    "JSON without a mask": (write_bytes("drag_instruction.json", b"{}"), "there is no file .*mask.png"),
    "mask of another size": (
        setting(mask=np.ones((128, 100), np.uint8)),
        "the mask is 100x128 pixels, the image 128x128",
    ),
    "mask in color": (
        setting(mask=np.ones((128, 128, 3), np.uint8)),
        r"the mask must be \(H, W\), uint8 or bool, got shape \(128, 128, 3\) and u1",
    ),
    "mask of floats": (
        setting(mask=np.ones((128, 128))),
        r"the mask must be \(H, W\), uint8 or bool, got shape \(128, 128\) and f8",
    ),
    "list for a mask": (setting(mask=[[1]]), "cannot read meta_data.pkl"),
    "odd number of points": (
        setting(points=[[20, 20]] * 3),
        "points must be pairs of handle and target, got 3 points",
    ),
    "no points": (setting(points=[]), "got 0 handles and 0 targets: give one or more pairs"),
    "short points": (
        setting(points=[[20], [30, 30]]),
        r'invalid drag {"handle": \[20\], "target": \[30, 30\]}',
    ),
    "points of text": (setting(points="1234"), r"points must be a list of \[x, y\]: "),
    "points outside": (
        setting(points=[[20, 20], [300, 30]]),
        "target 300,30 is outside the image of 128x128 pixels",
    ),
    "no prompt": (setting(prompt=None), "the prompt is missing"),
    "no key": (write_bytes("meta_data.pkl", pickle.dumps({"prompt": ""})), "meta_data.pkl has no points"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_cases_are_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    case = write_case(tmp_path, "animals/a", PAIRS["animals/a"])
    damage, words = BROKEN[kind]
    damage(case)
    with pytest.raises(ValueError, match=f"^animals/a: .*{words}"):
        read_case(case)


def test_find_cases_cycles_through_the_categories(tmp_path: Path) -> None:
    for name in ("animals/a", "animals/b", "animals/c", "cities/d", "people/e", "people/f", "__MACOSX/g"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "animals/.cache").mkdir()
    (tmp_path / "people/e/original_image.png").touch()
    (tmp_path / "read.me").touch()

    def names(categories: list[str] | None, limit: int | None) -> str:
        return "".join(path.name for path in find_cases(tmp_path, categories, limit))

    assert names(None, None) == "adebfc"
    assert names(None, 4) == "adeb"
    assert names(["people", "animals"], 3) == "aeb"
