"""JSON in and out, and files that are written whole or not at all."""

import hashlib
import os
from pathlib import Path

import pytest

from minidrag.system.files import read_json, sha256, unfinished, write_json, write_text, write_whole


def test_files_are_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    write_text(path, "all of it")
    assert path.read_text() == "all of it" and os.listdir(tmp_path) == ["result.txt"]
    inode = path.stat().st_ino
    write_text(path, "all of it")
    assert path.stat().st_ino != inode  # a new file took the name; the old one was never open for writing

    def fail(temporary: Path) -> None:
        assert temporary.suffix == ".txt"
        temporary.write_text("half")
        assert path.read_text() == "all of it"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "all of it" and os.listdir(tmp_path) == ["result.txt"]
    with pytest.raises(FileNotFoundError) as error:
        write_text(tmp_path / "no folder" / "result.txt", "all of it")
    assert error.value.filename == str(tmp_path / "no folder" / "result.txt"), "not the temporary file"


def test_json_survives_a_file(tmp_path: Path) -> None:
    values = {"image": "caf\udce9/照片.png", "paths": [[1.5, -2.0]], "mask": None, "arrived": True}
    write_json(tmp_path / "run.json", values)
    assert (tmp_path / "run.json").read_text().endswith("}\n")
    assert read_json(tmp_path / "run.json") == values


def test_json_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "run.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_unfinished_files_are_removed_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path) as part:
        (part / "half.png").write_bytes(b"half")
        assert part.parent == tmp_path
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_checksum_of_a_file_longer_than_one_read(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "long").write_bytes(content)
    assert sha256(tmp_path / "long") == hashlib.sha256(content).hexdigest()
