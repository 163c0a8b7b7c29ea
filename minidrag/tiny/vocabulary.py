"""Train a CLIP-style byte-pair vocabulary on captions and write it in the official layout."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers

from minidrag.networks.tokenizer import BOS, EOS, Tokenizer, prepare
from minidrag.system.files import write_json, write_text
from minidrag.weights.vocabulary import load_tokenizer


def train(captions: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a vocabulary, write CLIP's files to `folder` and load the tokenizer from them.

    vocab_size: at least 514 (256 bytes, 256 bytes at the end of a word, two special tokens). The vocabulary
    is smaller if the captions have too few pairs to merge. It does not depend on the captions' order.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # the order of CLIP's ids: "!" is 0
    alphabet = letters + [letter + "</w>" for letter in letters]
    limit = vocab_size - len(alphabet) - 2
    if limit < 0:
        raise ValueError(f"vocab_size must be at least 514, got {vocab_size}")
    merges = learn_merges(count_words(captions), limit)
    joins = dict.fromkeys(left + right for left, right in merges)  # two merges can give the same token
    tokens = [*alphabet, *joins, BOS, EOS]
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos = {"content": BOS, **flags}
    eos = {"content": EOS, **flags}
    specials = {"bos_token": bos, "eos_token": eos, "pad_token": EOS, "unk_token": eos}
    config = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(folder / "special_tokens_map.json", specials)
    write_json(folder / "tokenizer_config.json", config)
    lines = ["#version: 0.2"] + [f"{left} {right}" for left, right in merges]
    write_text(folder / "merges.txt", "\n".join([*lines, ""]))
    return load_tokenizer(folder)


def count_words(captions: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Count the words of all captions, each split into letters with "</w>" on the last."""
    encoder = prepare(Encoder(models.BPE()))
    words: Counter[tuple[str, ...]] = Counter()
    for caption, count in Counter(captions).items():
        for word, _ in encoder.pre_tokenizer.pre_tokenize_str(encoder.normalizer.normalize_str(caption)):
            words[(*word[:-1], word[-1] + "</w>")] += count
    return words


def learn_merges(words: Counter[tuple[str, ...]], limit: int) -> list[tuple[str, str]]:
    """Merge the most frequent adjacent pair, up to `limit` times (arXiv 1508.07909, algorithm 1)."""
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        # Alphabetical order breaks ties. The trainer in tokenizers leaves them to hash order.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({merge_pair(word, best): count for word, count in words.items()})
    return merges


def merge_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Replace every occurrence of the pair, from the left, with one token."""
    tokens: list[str] = []
    for token in word:
        if tokens and (tokens[-1], token) == pair:
            tokens[-1] += token
        else:
            tokens.append(token)
    return tuple(tokens)
