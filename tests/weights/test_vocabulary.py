"""Tokenizers from their files: as official folders have them, as editors leave them, or broken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minidrag.tiny.vocabulary import train
from minidrag.weights.vocabulary import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train(["a red circle on the grass", "a blue square"], 540, tmp_path)
    return tmp_path


@pytest.mark.parametrize("limit", [16, 77, 512, 10**30, 1e30])
def test_length_of_a_tokenizer(folder: Path, limit: int) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert load_tokenizer(folder)("a " * 100).shape == (1, min(limit, 77))


def test_a_tokenizer_needs_only_two_files(folder: Path) -> None:
    before = load_tokenizer(folder)("a red square")
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert torch.equal(load_tokenizer(folder)("a red square"), before)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_file_of_a_tokenizer(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load_tokenizer(folder)


@pytest.mark.parametrize("change", [lambda x: b"\xef\xbb\xbf" + x, lambda x: x + b"\n \n"])
def test_merges_as_editors_leave_them(folder: Path, change: Callable[[bytes], bytes]) -> None:
    expected = load_tokenizer(folder)("a photo").tolist()
    file = folder / "merges.txt"
    file.write_bytes(change(file.read_bytes()))
    assert load_tokenizer(folder)("a photo").tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"", "vocab.json cannot be read as JSON: it is not valid JSON"),
        ("vocab.json", b'{"a": 0, "b', "vocab.json cannot be read as JSON: it is not valid JSON"),
        ("vocab.json", b"\xff\xfe\x00", "vocab.json cannot be read as JSON: it is not text in UTF-8"),
        ("vocab.json", b"[1, 2]", "vocab.json is not a JSON object"),
        ("vocab.json", b'{"a": 0}', "the vocabulary lacks"),
        ("merges.txt", b"#version: 0.2\na b c\n", "merges.txt is not a list of pairs"),
        ("merges.txt", b"\xff\xfe\x00", "merges.txt is not a list of pairs"),
        ("merges.txt", b"#version: 0.2\nqqq zzz\n", "Token `qqq` out of vocabulary"),
        ("merges.txt", b"\xed\xa0\x80 b\n", r"download it again \(it is not text in UTF-8\)"),
        (
            "special_tokens_map.json",
            b"{",
            "special_tokens_map.json cannot be read as JSON: it is not valid JSON",
        ),
        ("special_tokens_map.json", b'{"pad_token": "<pad>"}', "lacks <pad>"),
        ("special_tokens_map.json", b'{"pad_token": 3}', "pad_token"),
        ("special_tokens_map.json", b'{"pad_token": {"x": 3}}', "pad_token"),
        ("vocab.json", b'{"a": "0"}', "the token 'a' has '0' instead of an id"),
        ("vocab.json", b'{"a": -1}', "the token 'a' has -1"),
        ("vocab.json", b'{"a": true}', "the token 'a' has True"),
        ("vocab.json", b'{"a": 1e3}', "the token 'a' has 1000.0"),
        ("vocab.json", b'{"a": 99999999999}', "the token 'a' has 99999999999"),
        ("vocab.json", b"[" * 100_000, "nested too deep"),
        ("merges.txt", b"", "merges.txt is not a list of pairs"),
        ("merges.txt", b"#version: 0.2\n", "the merges make only 0 of"),
        ("merges.txt", b"abc\n", "a line is 'abc'"),
        ("tokenizer_config.json", b'{"model_max_length": 0}', "model_max_length = 0 is not"),
        ("tokenizer_config.json", b'{"model_max_length": NaN}', "NaN is not valid JSON"),
        ("tokenizer_config.json", b'{"model_max_length": true}', "model_max_length = True is not"),
        ("tokenizer_config.json", b'{"model_max_length": "77"}', "model_max_length = '77' is not"),
        ("tokenizer_config.json", b'{"model_max_length": [77]}', r"model_max_length = \[77\] is not"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added tokens are not a list"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {"content": "y"}}}',
            "'y' with the id 'x'",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9": 3}}', "None with the id 9"),
        ("added_tokens.json", b'{"<x>": "y"}', "'<x>' with the id 'y'"),
        ("added_tokens.json", b'{"<x>": -3}', "'<x>' with the id -3"),
        ("added_tokens.json", b'{"<x>": 3}', "two tokens have the same id"),
        ("added_tokens.json", b'{"a": 600}', "'a' has the ids"),
        ("added_tokens.json", b"[1]", "added_tokens.json is not a JSON object"),
        ("tokenizer.json", b'{"added_tokens": 3}', "added tokens are not a list"),
        ("tokenizer.json", b'{"added_tokens": [3]}', "None with the id None"),
        ("tokenizer.json", b"{", "tokenizer.json cannot be read as JSON: it is not valid JSON"),
    ],
)
def test_broken_file_of_a_tokenizer(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
