"""CLIP's tokenizer: a prompt to the 77 token ids that the text encoder reads.

Model folders hold `vocab.json` and `merges.txt` but no ready `tokenizer.json`: it is put together here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder
from torch import Tensor

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Contractions, runs of letters, single digits, runs of anything else; the specials, so that they stay whole.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Byte-level byte-pair encoding as CLIP was trained with (arXiv 2103.00020 section 2.4).

    merges: best first. context: how many ids a prompt gets, both ends among them.
    pad: the token that fills up a short prompt; the text encoder reads it like any other.
    """

    def __init__(
        self, vocabulary: dict[str, int], merges: list[tuple[str, str]], pad: str = EOS, context: int = 77
    ):
        missing = [token for token in (BOS, EOS, pad) if token not in vocabulary]
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}")
        self.bos, self.eos, self.pad = (vocabulary[token] for token in (BOS, EOS, pad))
        self.context = context
        model = models.BPE(vocabulary, merges, unk_token=EOS, end_of_word_suffix="</w>")
        self.encoder = prepare(Encoder(model))
        # Specials typed in a prompt stay whole, as does SD 2.x's pad token "!". As in transformers, the ends
        # are found in any case of letters, but the pad token, which may be one of them, only as written.
        specials = [AddedToken(BOS, normalized=True), AddedToken(EOS, normalized=pad != EOS)]
        specials += [AddedToken(pad, normalized=False)] if pad not in (BOS, EOS) else []
        self.encoder.add_special_tokens(specials)
        self.encoder.post_processor = processors.RobertaProcessing(
            (EOS, self.eos), (BOS, self.bos), trim_offsets=False, add_prefix_space=False
        )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads `vocab.json` and `merges.txt`; the pad token and the length too where files beside them tell.

        Raises FileNotFoundError or ValueError, naming the file, where one is missing or broken.
        """
        for path in (folder / "vocab.json", folder / "merges.txt"):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: copy it from the model's folder named tokenizer")
        pad = read_json(folder / "special_tokens_map.json", {}).get("pad_token", EOS)
        limit = read_json(folder / "tokenizer_config.json", {}).get("model_max_length", 77)
        vocabulary, merges = read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
        try:
            # The text encoder has 77 positions; a config that knows no length gives an absurdly large one.
            return cls(vocabulary, merges, pad["content"] if isinstance(pad, dict) else pad, min(limit, 77))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"vocab.json and merges.txt in {folder} do not fit together: {error}") from error

    def __call__(self, prompts: str | list[str]) -> Tensor:
        """Returns ids, (B, context), int64: start, as much of the prompt as fits, end, padding."""
        encodings = self.encoder.encode_batch([prompts] if isinstance(prompts, str) else prompts)
        rows = torch.full((len(encodings), self.context), self.pad, dtype=torch.int64)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = torch.tensor(encoding.ids[: self.context])
            row[: len(ids)] = ids
            row[len(ids) - 1] = self.eos  # also where the prompt was cut
        return rows

    def length(self, prompt: str) -> int:
        """Counts a prompt's tokens, both ends included, nothing cut: what is above `context` goes unread."""
        return len(self.encoder.encode(prompt))


def prepare(encoder: Encoder) -> Encoder:
    """Gives an encoder CLIP's clean-up of text and its split into pieces; returns it."""
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    encoder.normalizer = normalizers.Sequence(clean)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return encoder


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Reads a JSON object, or takes the default, where there is one, for a file that is not there."""
    if default is not None and not path.exists():
        return default
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON, fetch it again: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object, fetch it again")
    return values


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Reads the pairs of tokens to merge, one a line after a line with a version."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return [(left, right) for left, right in pairs]
    except ValueError as error:
        raise ValueError(f"{path} is not a list of pairs of tokens, fetch it again: {error}") from error
