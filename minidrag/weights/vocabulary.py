"""A tokenizer from the files that model folders have: vocab.json and merges.txt, or tokenizer.json."""

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from minidrag.networks.tokenizer import BOS, EOS, Tokenizer
from minidrag.system.files import MAX_JSON, check_regular
from minidrag.weights.configs import SHORT
from minidrag.weights.files import Json, read_object

AddedTokens = dict[str, tuple[AddedToken, int]]  # an added token and its id, by its text
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token
CONTEXT = 77  # positions of the text encoder
SETTINGS: Json = {  # tokenizer_config.json of a CLIP vocabulary
    "add_prefix_space": False,
    "bos_token": BOS,
    "do_lower_case": True,
    "eos_token": EOS,
    "errors": "replace",
    "model_max_length": CONTEXT,
    "pad_token": EOS,
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": EOS,
}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer from vocab.json and merges.txt or, as transformers saves it today, tokenizer.json.

    special_tokens_map.json and tokenizer_config.json may set the pad token and the length; those two,
    tokenizer.json and added_tokens.json may add tokens, of textual inversion for example.
    Raises FileNotFoundError for a missing file, ValueError for a broken one.
    """
    settings = read_object(folder / "tokenizer_config.json", {})
    specials = read_object(folder / "special_tokens_map.json", {})
    whole = read_object(folder / "tokenizer.json", {})
    names, vocabulary, merges = read_vocabulary(folder, whole)
    pad = specials.get("pad_token") or settings.get("pad_token") or EOS
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str):
        raise ValueError(f"the pad_token of {folder} is not a text: replace its special_tokens_map.json")
    try:
        check_vocabulary(vocabulary, merges)
        added = added_tokens(folder, settings, specials, whole)
        for text, (_, number) in added.items():
            if vocabulary.setdefault(text, number) != number:
                raise ValueError(f"{text!r} has the ids {vocabulary[text]} and {number}")
        if len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError("two tokens have the same id")
        tokens = [token for token, _ in added.values()]
        return Tokenizer(vocabulary, merges, pad, context_of(settings), tokens)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{names} in {folder} do not fit together: {error}") from error


def context_of(settings: Json) -> int:
    """Return the ids per prompt: at most CONTEXT, as a file without a limit names an absurdly large one."""
    limit = settings.get("model_max_length")
    if limit is None:
        return CONTEXT
    if type(limit) not in (int, float) or limit < 2:
        raise ValueError(f"model_max_length = {SHORT.repr(limit)} is not a number of tokens")
    return int(min(limit, CONTEXT))


def read_vocabulary(folder: Path, whole: Json) -> tuple[str, dict[str, Any], list[tuple[str, str]]]:
    """Names of the files, numbers by token, and merges; whole: the content of tokenizer.json."""
    files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [file for file in files if not file.exists()]
    if not missing:
        return "vocab.json and merges.txt", read_object(files[0]), read_merges(files[1])
    if not whole:
        raise FileNotFoundError(f"{missing[0]} is missing: copy it from the model's tokenizer folder")
    model = whole.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary = model.get("vocab")
    merges = model.get("merges")
    suffix = model.get("end_of_word_suffix")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list) or suffix != "</w>":
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer of CLIP: copy the model's own")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise ValueError(f"{folder / 'tokenizer.json'} has merges that are not pairs of tokens: replace it")
    return "vocabulary and merges of tokenizer.json", vocabulary, [(left, right) for left, right in pairs]


def is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**24


def check_vocabulary(vocabulary: dict[str, Any], merges: list[tuple[str, str]]) -> None:
    """Raise ValueError for numbers that are not ids, and for merges that are too few for the vocabulary."""
    for token, number in vocabulary.items():
        if not is_id(number):
            raise ValueError(f"the token {token!r} has {SHORT.repr(number)} instead of an id")
    long = {token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and token not in (BOS, EOS)}
    made = {left + right for left, right in merges}
    # A few tokens may have been added by hand.
    if len(long - made) > (len(vocabulary) // 10 if merges else 0):
        raise ValueError(f"the merges make only {len(long & made)} of {len(long)} tokens: some are missing")


def added_tokens(folder: Path, settings: Json, specials: Json, whole: Json) -> AddedTokens:
    """Tokens that no merge makes, with their ids, by content; ValueError for broken ones."""
    decoder = settings.get("added_tokens_decoder") or {}
    listed = whole.get("added_tokens") or []
    if not isinstance(decoder, dict) or not isinstance(listed, list):
        raise ValueError("the added tokens are not a list")
    entries = [(int(n) if re.fullmatch(r"[0-9]{1,9}", n) else n, entry) for n, entry in decoder.items()]
    entries += [(entry.get("id"), entry) if isinstance(entry, dict) else (None, entry) for entry in listed]
    others = specials.get("additional_special_tokens")
    for content, number in read_object(folder / "added_tokens.json", {}).items():
        special = isinstance(others, list) and content in others
        entries.append((number, {"content": content, "normalized": not special}))
    added: AddedTokens = {}
    for number, entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not is_id(number):
            raise ValueError(f"an added token is {SHORT.repr(content)} with the id {SHORT.repr(number)}")
        flags = {name: bool(entry[name]) for name in FLAGS if name in entry}
        if added.setdefault(content, (AddedToken(content, **flags), number))[1] != number:
            raise ValueError(f"{content!r} has the ids {added[content][1]} and {number}")
    return added


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read pairs of tokens to merge, one per line, after a line with the version."""
    check_regular(path, MAX_JSON)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        if not lines:
            raise ValueError("it is empty")
        pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        if wrong := [pair for pair in pairs if len(pair) != 2]:
            raise ValueError(f"a line is {SHORT.repr(' '.join(wrong[0]))}")
        return [(left, right) for left, right in pairs]
    except ValueError as error:
        why = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{path} is not a list of pairs of tokens: download it again ({why})") from error
