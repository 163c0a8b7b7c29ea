"""Learns a CLIP-style vocabulary from captions: byte-pair encoding in the layout of the official files."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers

from minidrag.networks.tokenizer import BOS, EOS, Tokenizer, prepare


def train(captions: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Learns a vocabulary, writes it to `folder` as CLIP's files, and returns the tokenizer read from there.

    vocab_size: at least 514: 256 bytes, the same ending a word, merges, and the two specials as last ids.
    The result is smaller where the captions have fewer pairs to merge; their order does not matter.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # the order of CLIP's ids: "!" is 0
    alphabet = letters + [letter + "</w>" for letter in letters]
    most = vocab_size - len(alphabet) - 2
    if most < 0:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: the bytes and specials alone are 514")
    merges = learn_merges(count_words(captions), most)
    joins = dict.fromkeys(left + right for left, right in merges)  # two merges can make the same token
    tokens = [*alphabet, *joins, BOS, EOS]
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = {"content": BOS, **flags}, {"content": EOS, **flags}
    specials = {"bos_token": bos, "eos_token": eos, "pad_token": EOS, "unk_token": eos}
    config = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(folder / "special_tokens_map.json", specials)
    write_json(folder / "tokenizer_config.json", config)
    lines = ["#version: 0.2"] + [f"{left} {right}" for left, right in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Tokenizer.load(folder)


def count_words(captions: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Counts the words of all captions, each as its letters, the last one marked as the end of a word."""
    encoder = prepare(Encoder(models.BPE()))
    words: Counter[tuple[str, ...]] = Counter()
    for caption, times in Counter(captions).items():
        for word, _ in encoder.pre_tokenizer.pre_tokenize_str(encoder.normalizer.normalize_str(caption)):
            words[(*word[:-1], word[-1] + "</w>")] += times
    return words


def learn_merges(words: Counter[tuple[str, ...]], most: int) -> list[tuple[str, str]]:
    """Joins the most frequent pair of neighbours, again and again (arXiv 1508.07909, algorithm 1)."""
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        # Ties go by the alphabet: the trainer that comes with tokenizers lets the hash order decide.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({joined(word, best): times for word, times in words.items()})
    return merges


def joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with every occurrence of the pair, from the left, as one token."""
    tokens: list[str] = []
    for token in word:
        if tokens and (tokens[-1], token) == pair:
            tokens[-1] += token
        else:
            tokens.append(token)
    return tuple(tokens)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
