"""CLIP's tokenizer: a prompt to the 77 token ids that the text encoder takes.

Official model folders have `vocab.json` and `merges.txt` but no `tokenizer.json`, so it is assembled here.
"""

import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder
from torch import Tensor

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Special tokens, kept whole; contractions; runs of letters; single digits; runs of other characters.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """CLIP's byte-level byte-pair encoding (arXiv 2103.00020, section 2.4).

    merges: highest priority first. pad: token that fills up short prompts. context: ids per prompt, start
    and end included. Raises ValueError for a vocabulary that lacks a special token.
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
        # As in transformers: BOS and EOS in a prompt match in any case, the pad token only as written.
        specials = [AddedToken(BOS, normalized=True), AddedToken(EOS, normalized=pad != EOS)]
        specials += [AddedToken(pad, normalized=False)] if pad not in (BOS, EOS) else []
        self.encoder.add_special_tokens(specials)
        ends = (EOS, self.eos), (BOS, self.bos)
        wrap = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
        self.encoder.post_processor = wrap

    def __call__(self, prompts: str | list[str]) -> Tensor:
        """Return ids (B, context), int64: start, the prompt, truncated if need be, end, padding."""
        encodings = self.encoder.encode_batch([prompts] if isinstance(prompts, str) else prompts)
        rows = torch.full((len(encodings), self.context), self.pad, dtype=torch.int64)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = torch.tensor(encoding.ids[: self.context])
            row[: len(ids)] = ids
            row[len(ids) - 1] = self.eos  # a truncated prompt has lost its own
        return rows

    def length(self, prompt: str) -> int:
        """Count a prompt's tokens, start and end included; those beyond `context` are truncated in a call."""
        return len(self.encoder.encode(prompt))


def prepare(encoder: Encoder) -> Encoder:
    """Set CLIP's text normalization and pre-tokenization on an encoder; return it."""
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    encoder.normalizer = normalizers.Sequence(clean)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return encoder
