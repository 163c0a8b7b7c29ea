"""CLIP's tokenizer: a prompt to the 77 token ids that the text encoder takes.

Official model folders have `vocab.json` and `merges.txt` but no `tokenizer.json`, so it is assembled here.
"""

from collections.abc import Sequence
from itertools import count, takewhile

import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder
from torch import Tensor

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
# Special tokens; contractions; runs of letters; single digits; runs of other characters.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """CLIP's byte-level byte-pair encoding (arXiv 2103.00020, section 2.4).

    merges: highest priority first. pad: token that fills up short prompts. context: ids per prompt, start
    and end included. added: tokens that are never split, of textual inversion for example; the vocabulary has
    their ids. Raises ValueError for a vocabulary that lacks a special token.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: list[tuple[str, str]],
        pad: str = EOS,
        context: int = 77,
        added: Sequence[AddedToken] = (),
    ):
        missing = [token for token in (BOS, EOS, pad) if token not in vocabulary]
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}")
        self.bos, self.eos, self.pad = (vocabulary[token] for token in (BOS, EOS, pad))
        self.context = context
        self.size = max(vocabulary.values()) + 1  # rows of the token embedding
        model = models.BPE(vocabulary, merges, unk_token=EOS, end_of_word_suffix="</w>")
        self.encoder = prepare(Encoder(model))
        # As in transformers: BOS and EOS in a prompt match in any case, the pad token only as written.
        specials = [AddedToken(BOS, normalized=True), AddedToken(EOS, normalized=pad != EOS)]
        specials += [AddedToken(pad, normalized=False)] if pad not in (BOS, EOS) else []
        self.encoder.add_special_tokens(specials)
        self.encoder.add_tokens([token for token in added if token.content not in (BOS, EOS, pad)])
        ends = (EOS, self.eos), (BOS, self.bos)
        wrap = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
        self.encoder.post_processor = wrap
        # As in diffusers: a concept of several vectors is named by its first token, <name>, <name>_1, ...
        self.rest = {vocabulary[token.content]: extra_ids(token.content, vocabulary) for token in added}

    def __call__(self, prompts: str | list[str]) -> Tensor:
        """Return ids (B, context), int64: start, the prompt, truncated if need be, end, padding."""
        encodings = self.encoder.encode_batch([prompts] if isinstance(prompts, str) else prompts)
        rows = torch.full((len(encodings), self.context), self.pad, dtype=torch.int64)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = torch.tensor(self.complete(encoding.ids)[: self.context])
            row[: len(ids)] = ids
            row[len(ids) - 1] = self.eos  # a truncated prompt has lost its own
        return rows

    def length(self, prompt: str) -> int:
        """Count a prompt's tokens, start and end included; those beyond `context` are truncated in a call."""
        return len(self.complete(self.encoder.encode(prompt).ids))

    def complete(self, ids: list[int]) -> list[int]:
        """Expand each multi-vector concept that the prompt names by its first token."""
        if not any(self.rest.values()):
            return ids
        pairs = zip(ids, [*ids[1:], None], strict=True)
        added = ([i, *(rest if (rest := self.rest.get(i, []))[:1] != [after] else [])] for i, after in pairs)
        return [i for group in added for i in group]


def extra_ids(token: str, vocabulary: dict[str, int]) -> list[int]:
    """Ids of a concept's further vectors: token_1, token_2, ..."""
    names = takewhile(vocabulary.__contains__, (f"{token}_{number}" for number in count(1)))
    return [vocabulary[name] for name in names]


def prepare(encoder: Encoder) -> Encoder:
    """Set CLIP's text normalization and pre-tokenization on an encoder; return it."""
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    encoder.normalizer = normalizers.Sequence(clean)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return encoder
