"""The UNet against diffusers: outputs, gradients, and attention to given keys and values."""

from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from support.references import (
    SD15_UNET,
    SD21_UNET,
    UNETS,
    official_names,
    our_unet,
    random,
    reference_unet,
    run_reference_unet,
    same_weights,
    shapes,
    unet_pairs,
    up_self_attentions,
)
from torch import Tensor, nn

from minidrag.networks.unet import TimestepEmbedding, UNet, UNetOutput

SIZES = {"non-square": (16, 24), "odd": (16, 13), "odd twice": (9, 7)}  # of the latent: height, width


@cache
def networks(kind: str) -> tuple[UNet, Any]:
    """Ours and diffusers' with the same weights; cached, since no test changes them."""
    ours, reference = our_unet(UNETS[kind]), reference_unet(UNETS[kind])
    same_weights(reference, ours, torch.float64)
    return ours, reference


def inputs(kind: str, size: tuple[int, int] = (16, 13)) -> tuple[Tensor, Tensor]:
    return random(2, 4, *size, seed=1), random(2, 11, UNETS[kind]["cross_attention_dim"], seed=2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", UNETS)
def test_noise_features_keys_and_values_equal_diffusers(kind: str, size: str, compare: Callable) -> None:
    (ours, reference), (latent, text) = networks(kind), inputs(kind, SIZES[size])
    with torch.no_grad():
        pairs = unet_pairs(ours(latent, 681, text), run_reference_unet(reference, latent, 681, text))
    for name, pair in pairs.items():
        compare(f"UNet {kind}, {name.split()[0]}", *pair)


@pytest.mark.parametrize("timestep", [0, 1, 981, 999])
@pytest.mark.parametrize("kind", UNETS)
def test_the_first_and_last_timesteps_equal_diffusers(kind: str, timestep: int, compare: Callable) -> None:
    (ours, reference), (latent, text) = networks(kind), inputs(kind, (8, 8))
    given = latent, timestep, text
    with torch.no_grad():
        pairs = unet_pairs(ours(*given), run_reference_unet(reference, *given))
    for pair in pairs.values():
        compare(f"UNet {kind}, first and last timesteps", *pair)


def test_a_timestep_can_be_an_int_a_scalar_tensor_or_one_per_sample(compare: Callable) -> None:
    (ours, reference), (latent, text) = networks("SD 1.5"), inputs("SD 1.5", (8, 8))
    with torch.no_grad():
        integer, scalar = ours(latent, 981, text).noise, ours(latent, torch.tensor(981), text).noise
        each = ours(latent, torch.tensor([1, 981]), text).noise
        expected = reference(latent, torch.tensor([1, 981]), text).sample
    assert torch.equal(integer, scalar)
    compare("UNet SD 1.5, a timestep per sample", each, expected)


def test_worked_example_of_the_timestep_embedding() -> None:
    """The first cosines and sines of timestep 681 in SD 1.5, with identity matrices as linear layers."""
    embedding = TimestepEmbedding(320, 320)
    for linear in (embedding.linear_1, embedding.linear_2):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    with torch.no_grad():
        [found] = embedding(torch.tensor([681]), torch.float32)
    worked = torch.tensor([-0.748098, -0.434748, 0.663589, 0.900552])
    expected = worked / (1 + (-worked).exp())  # the SiLU between the two layers
    torch.testing.assert_close(found[[0, 1, 160, 161]], expected, atol=1e-6, rtol=0)


def test_feature_sizes_of_a_latent_with_odd_sides() -> None:
    (ours, _), (latent, text) = networks("SD 1.5"), inputs("SD 1.5", (16, 13))
    with torch.no_grad():
        output = ours(latent, 681, text)
    assert [tuple(f.shape[2:]) for f in output.features] == [(4, 4), (8, 7), (16, 13), (16, 13)]
    tokens = [[k.shape[1] for k, _ in block] for block in output.keys_values]
    assert tokens == [[], [4 * 4] * 3, [8 * 7] * 3, [16 * 13] * 3]


def feature_loss(output: UNetOutput) -> Tensor:
    """Differences between neighbors on the feature map of each up block, as in motion supervision."""
    return torch.stack([((f[..., 1:] - f[..., :-1]) ** 2).sum() for f in output.features]).sum()


def noise_loss(output: UNetOutput) -> Tensor:
    return (output.noise**2).sum()


def key_value_loss(output: UNetOutput) -> Tensor:
    return torch.stack([(k**2).sum() + (v**3).sum() for k, v in chain(*output.keys_values)]).sum()


def gradient(run: Callable[..., UNetOutput], loss: Callable, latent: Tensor, *inputs: Any) -> Tensor:
    latent = latent.clone().requires_grad_(True)
    return torch.autograd.grad(loss(run(latent, *inputs)), latent)[0]


@pytest.mark.parametrize("loss", [feature_loss, noise_loss, key_value_loss])
@pytest.mark.parametrize("kind", UNETS)
def test_gradients_with_respect_to_the_latent_equal_diffusers(
    kind: str, loss: Callable, compare: Callable
) -> None:
    (ours, reference), (latent, text) = networks(kind), inputs(kind)
    expected = gradient(lambda *args: run_reference_unet(reference, *args), loss, latent, 681, text)
    name = loss.__name__.replace("_", " ")
    compare(f"UNet {kind}, gradient of a {name}", gradient(ours, loss, latent, 681, text), expected)


@pytest.mark.parametrize("kind", UNETS)
def test_checkpointing_changes_neither_outputs_nor_gradients(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ours, _), (latent, text) = networks(kind), inputs(kind)
    outputs, gradients = [], []
    for checkpointing in (False, True):
        monkeypatch.setattr(ours, "checkpointing", checkpointing)
        outputs.append(ours(latent.requires_grad_(True), 681, text))
        gradients.append([gradient(ours, loss, latent, 681, text) for loss in (feature_loss, noise_loss)])
    assert all(torch.equal(*pair) for pair in unet_pairs(*outputs).values())
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_checkpointing_saves_fewer_tensors_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, _), (latent, text) = networks("SD 1.5"), inputs("SD 1.5")
    kept = {}
    for checkpointing in (False, True):
        monkeypatch.setattr(ours, "checkpointing", checkpointing)
        tensors: list[Tensor] = []

        def keep(tensor: Tensor, kept: list[Tensor] = tensors) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ours(latent.requires_grad_(True), 681, text)
        kept[checkpointing] = sum({t.data_ptr(): t.numel() for t in tensors}.values())
    assert kept[True] < kept[False] / 4


class AttendToGiven:
    """A diffusers attention processor that replaces K and V, with the softmax written out."""

    def __init__(self, key: Tensor, value: Tensor):
        self.key, self.value = key, value

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query = attn.to_q(hidden_states)
        width = query.shape[2] // attn.heads
        mixed = torch.empty_like(query)
        for head in range(attn.heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[..., part] @ self.key[..., part].transpose(1, 2) / width**0.5
            mixed[..., part] = scores.softmax(dim=-1) @ self.value[..., part]
        return attn.to_out[0](mixed)


def give(reference: Any, given: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the self-attentions of diffusers' last up blocks attend to the given keys and values."""
    layers = chain(*up_self_attentions(reference)[-len(given) :])
    for attention, pair in zip(layers, chain(*given), strict=True):
        monkeypatch.setattr(attention, "processor", AttendToGiven(*pair))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", UNETS)
def test_given_keys_and_values_equal_a_diffusers_processor_that_replaces_them(
    kind: str, blocks: int, compare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ours, reference), (latent, text) = networks(kind), inputs(kind)
    with torch.no_grad():
        given = ours(random(*latent.shape, seed=3), 681, text).keys_values[-blocks:]
        give(reference, given, monkeypatch)
        found, own = ours(latent, 681, text, given), ours(latent, 681, text)
        expected = reference(latent, 681, text).sample
    compare(f"UNet {kind}, noise with given keys and values", found.noise, expected)
    assert (found.noise - own.noise).abs().max() > 1e-2  # they have an effect


@pytest.mark.parametrize("kind", UNETS)
def test_the_gradient_through_given_keys_and_values_equals_diffusers(
    kind: str, compare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ours, reference), (latent, text) = networks(kind), inputs(kind)
    given = ours(random(*latent.shape, seed=3), 681, text).keys_values
    give(reference, given, monkeypatch)

    def run(latent: Tensor) -> UNetOutput:
        return UNetOutput(reference(latent, 681, text).sample, [], [])

    found = gradient(ours, noise_loss, latent, 681, text, given)
    compare(f"UNet {kind}, gradient with given keys and values", found, gradient(run, noise_loss, latent))


@pytest.mark.parametrize("kind", UNETS)
def test_a_latent_given_its_own_keys_and_values_is_unchanged(kind: str) -> None:
    (ours, _), (latent, text) = networks(kind), inputs(kind)
    with torch.no_grad():
        own = ours(latent, 681, text)
        again = ours(latent, 681, text, own.keys_values)
    assert all(torch.equal(*pair) for pair in unet_pairs(own, again).values())


def record_layers(ours: nn.Module, *inputs: Any) -> dict[str, list[Tensor]]:
    """Tokens, context, and the keys and values used by every attention layer, by its name."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable:
        return lambda _, args, output: seen.update({name: [*args[:2], *output[1]]})

    layers = [layer for layer in ours.named_modules() if layer[0].endswith(("attn1", "attn2"))]
    hooks = [module.register_forward_hook(hook(name)) for name, module in layers]
    with torch.no_grad():
        ours(*inputs)
    for handle in hooks:
        handle.remove()
    return seen


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("kind", UNETS)
def test_given_keys_and_values_reach_their_self_attentions_and_no_other_layer(kind: str, blocks: int) -> None:
    (ours, _), (latent, text) = networks(kind), inputs(kind)
    with torch.no_grad():
        given = ours(random(*latent.shape, seed=3), 681, text).keys_values[-blocks:]
    own, replaced = record_layers(ours, latent, 681, text), record_layers(ours, latent, 681, text, given)
    places = tuple(f"up_blocks.{block}." for block in range(4 - blocks, 4))
    fed = [name for name in own if name.startswith(places) and name.endswith("attn1")]
    for name, pair in zip(fed, chain(*given), strict=True):
        assert all(torch.equal(*two) for two in zip(replaced[name][2:], pair, strict=True))
    before = list(own)[: list(own).index(fed[0])]
    assert len(before) + 2 * len(fed) == len(own)
    for name in before:  # layers before the first replacement compute the same
        assert all(torch.equal(*two) for two in zip(own[name], replaced[name], strict=True)), name
    for name in own:
        if name.endswith("attn2"):  # cross-attention reads the text as before
            assert all(torch.equal(*two) for two in zip(own[name][1:], replaced[name][1:], strict=True)), name


def test_a_call_has_no_effect_on_the_next() -> None:
    (ours, _), (latent, text) = networks("SD 1.5"), inputs("SD 1.5")
    with torch.no_grad():
        first = ours(latent, 681, text)
        ours(latent, 681, text, ours(random(*latent.shape, seed=3), 1, text).keys_values)
        second = ours(latent, 681, text)
    assert all(torch.equal(*pair) for pair in unet_pairs(first, second).values())


def test_full_size_names_and_shapes_are_those_of_the_official_file() -> None:
    listed = (Path(__file__).parents[1] / "data" / "sd15_unet.txt").read_text().splitlines()
    ours = our_unet(SD15_UNET)
    assert shapes(ours.state_dict()) == listed == shapes(official_names(reference_unet(SD15_UNET)))
    assert len(listed) == 686
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964


def test_sd_2_1_needs_only_another_configuration() -> None:
    ours = our_unet(SD21_UNET)
    assert shapes(ours.state_dict()) == shapes(official_names(reference_unet(SD21_UNET)))
    assert len(ours.state_dict()) == 686
    assert sum(p.numel() for p in ours.parameters()) == 865_910_724


# Measured: 0.0. Float32 rounding (against float64) is 4e-6 here, and another order of summation (channels
# last), which another processor may use, gives 6e-6, both for values up to 5.
FULL_SIZE_TOLERANCE = 5e-5


@pytest.mark.slow
def test_the_full_size_equals_diffusers_in_float32(compare: Callable) -> None:
    ours, reference = our_unet(SD15_UNET), reference_unet(SD15_UNET)
    same_weights(reference, ours, torch.float32)
    latent, text = random(1, 4, 64, 64, seed=1).float(), random(1, 77, 768, seed=2).float()
    with torch.no_grad():
        found = ours(latent, 681, text)
        pairs = unet_pairs(found, run_reference_unet(reference, latent, 681, text))
    for name, pair in pairs.items():
        compare(f"UNet full size, float32, {name.split()[0]}", *pair, atol=FULL_SIZE_TOLERANCE)
