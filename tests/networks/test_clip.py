"""The text encoder against transformers, with prompts of every shape that the tokenizer returns."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.references import (
    SD15_TEXT,
    SD21_TEXT,
    TEXTS,
    official_names,
    our_text,
    prompt_tokens,
    reference_text,
    same_weights,
    shapes,
    text_pairs,
)

from minidrag.networks.clip import ACTIVATIONS

PADDING = {"padded with the end token": None, "padded with id 0": 0}  # SD 1.x; SD 2.x


@cache
def networks(kind: str, attention: str) -> tuple[Any, Any]:
    """Ours and transformers' with the same weights; cached, since no test changes them."""
    ours, reference = our_text(TEXTS[kind]), reference_text(TEXTS[kind], attention)
    same_weights(reference, ours, torch.float64)
    return ours, reference


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the softmax in transformers' eager attention at float64; it rounds to float32 (5e-7 here)."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", TEXTS)
def test_empty_short_and_truncated_prompts_equal_transformers(
    kind: str, attention: str, padding: str, compare: Callable
) -> None:
    ours, reference = networks(kind, attention)
    tokens = prompt_tokens(TEXTS[kind]["vocab_size"], PADDING[padding])
    with torch.no_grad():
        pairs = text_pairs(ours, reference, tokens)
    for pair in pairs.values():
        compare(f"text encoder {kind}, transformers' {attention} attention", *pair)


@pytest.mark.parametrize("kind", TEXTS)
def test_gradients_with_respect_to_token_embeddings_equal_transformers(kind: str, compare: Callable) -> None:
    ours, reference = networks(kind, "sdpa")
    tables = ours.text_model.embeddings.token_embedding.weight, reference.get_input_embeddings().weight
    for table in tables:
        table.requires_grad_(True)
    outputs = text_pairs(ours, reference, prompt_tokens(120))["text"]
    gradients = [torch.autograd.grad((x**3).sum(), t)[0] for x, t in zip(outputs, tables, strict=True)]
    for table in tables:
        table.requires_grad_(False)
    compare(f"text encoder {kind}, gradient", *gradients)


def test_fewer_than_77_tokens_equal_transformers(compare: Callable) -> None:
    ours, reference = networks("quick_gelu", "sdpa")
    with torch.no_grad():
        pairs = text_pairs(ours, reference, prompt_tokens(120)[:, :9])
    compare("text encoder quick_gelu, nine tokens", *pairs["text"])


def test_full_size_names_and_shapes_are_those_of_the_official_file() -> None:
    listed = (Path(__file__).parents[1] / "data" / "sd15_text_encoder.txt").read_text().splitlines()
    ours = our_text(SD15_TEXT)
    assert shapes(ours.state_dict()) == listed == shapes(official_names(reference_text(SD15_TEXT)))
    assert len(listed) == 196
    assert sum(p.numel() for p in ours.parameters()) == 123_060_480


def test_sd_2_1_needs_only_another_configuration() -> None:
    ours = our_text(SD21_TEXT)
    assert shapes(ours.state_dict()) == shapes(official_names(reference_text(SD21_TEXT)))
    assert len(ours.state_dict()) == 372


def test_worked_example_of_the_activations() -> None:
    """Values at -1; the tanh approximation of GELU gives -0.158808."""
    for name, value in {"quick_gelu": -0.154204, "gelu": -0.158655}.items():
        assert abs(ACTIVATIONS[name]()(torch.tensor(-1.0, dtype=torch.float64)).item() - value) < 1e-6


# Measured: 0.0. Float32 rounding (against float64) is 4e-6 for values up to 4.6.
FULL_SIZE_TOLERANCE = 5e-5


@pytest.mark.slow
def test_the_full_size_equals_transformers_in_float32(compare: Callable) -> None:
    ours, reference = our_text(SD15_TEXT), reference_text(SD15_TEXT)
    same_weights(reference, ours, torch.float32)
    with torch.no_grad():
        pairs = text_pairs(ours, reference, prompt_tokens(SD15_TEXT["vocab_size"]))
    compare("text encoder full size, float32", *pairs["text"], atol=FULL_SIZE_TOLERANCE)
