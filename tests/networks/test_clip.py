"""The text encoder against transformers, on prompts of every shape that the tokenizer makes."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

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
from torch import nn

from minidrag.networks.clip import ACTIVATIONS, CLIPConfig

PADDING = {"padded with the end": None, "padded with id 0": 0}  # SD 1.x; SD 2.x


@cache
def networks(kind: str, attention: str) -> tuple[nn.Module, nn.Module]:
    """(ours, transformers') with the same weights; made once, since no test changes them."""
    ours, reference = our_text(TEXTS[kind]), reference_text(TEXTS[kind], attention)
    same_weights(reference, ours, torch.float64)
    return ours, reference


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention rounds its softmax to float32 (5e-7 here): this lets it keep float64."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", TEXTS)
def test_empty_short_and_overlong_prompts_equal_transformers(
    kind: str, attention: str, padding: str, compare: Callable
) -> None:
    ours, reference = networks(kind, attention)
    tokens = prompt_tokens(TEXTS[kind]["vocab_size"], PADDING[padding])
    with torch.no_grad():
        pairs = text_pairs(ours, reference, tokens)
    for pair in pairs.values():
        compare(f"text encoder {kind}, transformers' {attention} attention", *pair)


@pytest.mark.parametrize("kind", TEXTS)
def test_gradients_with_respect_to_the_token_vectors_equal_transformers(kind: str, compare: Callable) -> None:
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


def test_sd_2_1_is_the_same_class_by_configuration_alone() -> None:
    ours = our_text(SD21_TEXT)
    assert shapes(ours.state_dict()) == shapes(official_names(reference_text(SD21_TEXT)))
    assert len(ours.state_dict()) == 372


def test_the_official_config_gives_the_default_sizes() -> None:
    assert CLIPConfig.from_json(SD15_TEXT) == CLIPConfig()


def test_worked_numbers_of_the_two_activations() -> None:
    """At -1; the tanh form of the exact one would be -0.158808."""
    for name, value in {"quick_gelu": -0.154204, "gelu": -0.158655}.items():
        assert abs(ACTIVATIONS[name](torch.tensor(-1.0, dtype=torch.float64)).item() - value) < 1e-6


def test_a_config_with_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text encoder's config\.json has hidden_act = 'relu'"):
        CLIPConfig.from_json(SD15_TEXT | {"hidden_act": "relu"})


# Measured: 0.0. Float32's own rounding (the same network in float64) comes to 4e-6 of values up to 4.6.
FULL_SIZE_TOLERANCE = 5e-5


@pytest.mark.slow
def test_the_full_size_equals_transformers_in_float32(compare: Callable) -> None:
    ours, reference = our_text(SD15_TEXT), reference_text(SD15_TEXT)
    same_weights(reference, ours, torch.float32)
    with torch.no_grad():
        pairs = text_pairs(ours, reference, prompt_tokens(SD15_TEXT["vocab_size"]))
    compare("text encoder full size, float32", *pairs["text"], atol=FULL_SIZE_TOLERANCE)
