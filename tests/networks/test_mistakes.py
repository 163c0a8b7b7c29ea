"""Well-known mistakes, made on purpose: each must make the comparison of the parity tests fail.

The tolerance of those is 1e-9. Every mistake here must change an output by more than 1e-6, so no parity test
could pass with it.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.references import (
    TEXTS,
    UNETS,
    VAES,
    Pairs,
    difference,
    fill,
    our_text,
    our_unet,
    our_vae,
    prompt_tokens,
    random,
    reference_text,
    reference_unet,
    reference_vae,
    run_reference_unet,
    share_weights,
    text_pairs,
    unet_pairs,
    vae_pairs,
)
from torch import Tensor, nn

from minidrag.networks import clip, layers, unet, vae

Mistake = Callable[[pytest.MonkeyPatch, Any], None]  # changes one of our classes, or the network given


@cache
def reference_network(kind: str) -> Any:
    configs = {**UNETS, **VAES, **TEXTS}
    build = reference_unet if kind in UNETS else reference_vae if kind in VAES else reference_text
    reference = build(configs[kind])
    fill(reference, torch.float64)
    return reference


def networks(kind: str, size: tuple[int, int] = (8, 16)) -> tuple[Any, Callable[[], Pairs]]:
    """A new network of ours, for a test to change, and a function to pair its outputs with the library's."""
    reference = reference_network(kind)
    if kind in UNETS:
        ours, text = our_unet(UNETS[kind]), random(2, 11, UNETS[kind]["cross_attention_dim"], seed=2)
        inputs = random(2, 4, *size, seed=1), 681, text
        pairs = lambda: unet_pairs(ours(*inputs), run_reference_unet(reference, *inputs))  # noqa: E731
    elif kind in VAES:
        ours, image, latent = our_vae(VAES[kind]), random(2, 3, 32, 48, seed=1), random(2, 4, 6, 5, seed=2)
        pairs = lambda: vae_pairs(ours, reference, image, latent)  # noqa: E731
    else:
        ours, tokens = our_text(TEXTS[kind]), prompt_tokens(TEXTS[kind]["vocab_size"])
        pairs = lambda: text_pairs(ours, reference, tokens)  # noqa: E731
    share_weights(reference, ours)
    return ours, pairs


def worst(pairs: Pairs) -> float:
    return max(difference(*pair) for pair in pairs.values())


def eps(kind: type, ending: str, value: float) -> Mistake:
    """Set the eps of the norms of a kind whose dotted name ends with `ending`."""

    def mistake(_: pytest.MonkeyPatch, network: Any) -> None:
        norms = [m for name, m in network.named_modules() if isinstance(m, kind) and name.endswith(ending)]
        assert norms and all(norm.eps != value for norm in norms)
        for norm in norms:
            norm.eps = value

    return mistake


def replace(owner: Any, name: str, value: Any) -> Mistake:
    return lambda patch, _: patch.setattr(owner, name, value)


def leave_out(name: str) -> Mistake:
    return lambda patch, network: patch.setattr(
        network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Identity()
    )


def padding(symmetric: bool) -> Mistake:
    def mistake(_: pytest.MonkeyPatch, network: Any) -> None:
        for module in network.modules():
            if isinstance(module, layers.Downsample):
                module.symmetric, module.conv.padding = symmetric, (int(symmetric),) * 2

    return mistake


def wrapped(owner: type, change: Callable[..., Any]) -> Mistake:
    """Pass the result and the arguments of a class's forward through `change`."""

    def mistake(patch: pytest.MonkeyPatch, _: Any) -> None:
        right = owner.forward
        patch.setattr(owner, "forward", lambda self, *args: change(right(self, *args), *args))

    return mistake


def attention_with(change: Callable[..., Tensor]) -> Mistake:
    """Replace the attention function in all modules that use it; `change` gets the right one first."""

    def mistake(patch: pytest.MonkeyPatch, _: Any) -> None:
        right = layers.attention
        for module in (layers, clip):
            patch.setattr(module, "attention", lambda *args, **named: change(right, *args, **named))

    return mistake


def heads_and_width_swapped(
    right: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False
) -> Tensor:
    return right(q, k, v, q.shape[2] // heads, causal)


def scale_by_total_width(
    right: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False
) -> Tensor:
    return right(q / heads**0.5, k, v, heads, causal)


def not_causal(right: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    return right(q, k, v, heads, False)


def gated(activation: Callable[[Tensor], Tensor], swapped: bool = False) -> Callable:
    def forward(self: layers.GEGLU, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return gate * activation(value) if swapped else value * activation(gate)

    return forward


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def waves(sine_first: bool = False, shift: int = 0, kind: torch.dtype = torch.float32) -> Callable:
    def forward(self: unet.TimestepEmbedding, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.channels // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=kind) / (half - shift))
        angle = timestep[:, None] * frequency
        parts = [angle.sin(), angle.cos()] if sine_first else [angle.cos(), angle.sin()]
        return self.linear_2(F.silu(self.linear_1(torch.cat(parts, dim=1).to(dtype))))

    return forward


def upsampling(mode: str) -> Mistake:
    def forward(self: layers.Upsample, hidden: Tensor, size: Any = None) -> Tensor:
        size = size or (2 * hidden.shape[2], 2 * hidden.shape[3])
        return self.conv(F.interpolate(hidden, size=tuple(size), mode=mode))

    return replace(layers.Upsample, "forward", forward)


def skips_in_reverse(patch: pytest.MonkeyPatch, network: Any) -> None:
    block = network.up_blocks[0]  # its skips all have one width: in other blocks this would be an error
    right, n = block.forward, len(block.resnets)
    patch.setattr(block, "forward", lambda h, skips, *rest: right(h, skips[:-n] + skips[-n:][::-1], *rest))


def norms_swapped(_: pytest.MonkeyPatch, network: Any) -> None:
    for module in network.modules():
        if isinstance(module, layers.TransformerBlock):
            module.norm1, module.norm2 = module.norm2, module.norm1


def other_scale(_: pytest.MonkeyPatch, network: Any) -> None:
    network.config = vae.VAEConfig(scaling_factor=network.config.scaling_factor * 1.0001)


def halves_swapped(self: vae.VAE, image: Tensor) -> tuple[Tensor, Tensor]:
    log_variance, mean = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
    return mean * self.config.scaling_factor, torch.exp(0.5 * log_variance) * self.config.scaling_factor


def variance_for_std(self: vae.VAE, image: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
    return mean * self.config.scaling_factor, log_variance.exp() * self.config.scaling_factor


def many_heads(_: pytest.MonkeyPatch, network: Any) -> None:
    for module in network.modules():
        if isinstance(module, vae.VAEAttention):
            module.heads = 8


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tanh_gelu(x)


def activation(value: nn.Module) -> Mistake:
    def mistake(_: pytest.MonkeyPatch, network: Any) -> None:
        for layer in network.text_model.encoder.layers:
            layer.mlp.activation = value

    return mistake


def shorter(_: pytest.MonkeyPatch, network: Any) -> None:
    del network.text_model.encoder.layers[-1]


def positions_from_one(self: clip.Embeddings, tokens: Tensor) -> Tensor:
    return self.token_embedding(tokens) + self.position_embedding.weight.roll(-1, 0)


UNET_MISTAKES: dict[str, Mistake] = {
    "GroupNorm eps 1e-5 before the UNet's transformers": eps(nn.GroupNorm, ".norm", 1e-5),
    "GroupNorm eps 1e-6 in the UNet's first ResNet norms": eps(nn.GroupNorm, ".norm1", 1e-6),
    "GroupNorm eps 1e-6 in the UNet's second ResNet norms": eps(nn.GroupNorm, ".norm2", 1e-6),
    "GroupNorm eps 1e-6 in the UNet's last norm": eps(nn.GroupNorm, "conv_norm_out", 1e-6),
    "LayerNorm eps 1e-6 before self-attention": eps(nn.LayerNorm, ".norm1", 1e-6),
    "LayerNorm eps 1e-6 before cross-attention": eps(nn.LayerNorm, ".norm2", 1e-6),
    "LayerNorm eps 1e-6 before the feed-forward": eps(nn.LayerNorm, ".norm3", 1e-6),
    "tanh GELU in the UNet": replace(layers.GEGLU, "forward", gated(tanh_gelu)),
    "quick GELU in the UNet": replace(layers.GEGLU, "forward", gated(clip.QuickGELU())),
    "GEGLU halves swapped": replace(layers.GEGLU, "forward", gated(F.gelu, swapped=True)),
    "sine first": replace(unet.TimestepEmbedding, "forward", waves(sine_first=True)),
    "frequency shift 1": replace(unet.TimestepEmbedding, "forward", waves(shift=1)),
    "angles in float64": replace(unet.TimestepEmbedding, "forward", waves(kind=torch.float64)),
    "angles in bfloat16": replace(unet.TimestepEmbedding, "forward", waves(kind=torch.bfloat16)),
    "SiLU after the timestep embedding": wrapped(unet.TimestepEmbedding, lambda out, *_: F.silu(out)),
    "heads and head width swapped in the UNet": attention_with(heads_and_width_swapped),
    "attention scaled by the total width in the UNet": attention_with(scale_by_total_width),
    "causal attention in the UNet": attention_with(lambda right, *args: right(*args, True)),
    "no residual around the UNet's transformers": wrapped(
        layers.SpatialTransformer, lambda out, hidden, *_: (out[0] - hidden, out[1])
    ),
    "transformer norms swapped": norms_swapped,
    "cross-attention left out": wrapped(
        layers.Attention, lambda out, tokens, context, *_: (out[0] * (context is tokens), out[1])
    ),
    "UNet padded on the right and bottom only": padding(symmetric=False),
    "bilinear upsampling": upsampling("bilinear"),
    "nearest-exact upsampling": upsampling("nearest-exact"),
    "skips taken in the wrong order": skips_in_reverse,
    "keys and values returned in the wrong order": wrapped(
        layers.SpatialTransformer, lambda out, *_: (out[0], out[1][::-1])
    ),
}
VAE_MISTAKES: dict[str, Mistake] = {
    "GroupNorm eps 1e-5 in the VAE's first ResNet norms": eps(nn.GroupNorm, ".norm1", 1e-5),
    "GroupNorm eps 1e-5 in the VAE's second ResNet norms": eps(nn.GroupNorm, ".norm2", 1e-5),
    "GroupNorm eps 1e-5 in the VAE's attention": eps(nn.GroupNorm, "group_norm", 1e-5),
    "GroupNorm eps 1e-5 in the VAE's last norms": eps(nn.GroupNorm, "conv_norm_out", 1e-5),
    "VAE padded on all four sides": padding(symmetric=True),
    "scaling factor off by 0.01 percent": other_scale,
    "latent multiplied by the scaling factor instead of divided": replace(
        vae.VAE, "decode", lambda self, z: self.decoder(self.post_quant_conv(z * self.config.scaling_factor))
    ),
    "quant_conv left out": leave_out("quant_conv"),
    "post_quant_conv left out": leave_out("post_quant_conv"),
    "mean and log variance swapped": replace(vae.VAE, "encode", halves_swapped),
    "variance instead of standard deviation": replace(vae.VAE, "encode", variance_for_std),
    "no residual around the VAE's attention": wrapped(vae.VAEAttention, lambda out, hidden: out - hidden),
    "eight heads in the VAE": many_heads,
    "bilinear upsampling in the VAE": upsampling("bilinear"),
}
TEXT_MISTAKES: dict[str, Mistake] = {
    "no causal mask": attention_with(not_causal),
    "heads and head width swapped in the text encoder": attention_with(heads_and_width_swapped),
    "attention scaled by the total width in the text encoder": attention_with(scale_by_total_width),
    "LayerNorm eps 1e-6 before the text encoder's attention": eps(nn.LayerNorm, "layer_norm1", 1e-6),
    "LayerNorm eps 1e-6 before the text encoder's MLP": eps(nn.LayerNorm, "layer_norm2", 1e-6),
    "LayerNorm eps 1e-6 in the text encoder's last norm": eps(nn.LayerNorm, "final_layer_norm", 1e-6),
    "last norm left out": leave_out("text_model.final_layer_norm"),
    "positions counted from one": replace(clip.Embeddings, "forward", positions_from_one),
    "one layer too few": shorter,
    "tanh GELU in the text encoder": activation(TanhGELU()),
}
MISTAKES = {
    **{name: ("SD 1.5", mistake) for name, mistake in UNET_MISTAKES.items()},
    **{name: ("three halvings", mistake) for name, mistake in VAE_MISTAKES.items()},
    **{name: ("quick_gelu", mistake) for name, mistake in TEXT_MISTAKES.items()},
    "exact GELU in the SD 1.5 text encoder": ("quick_gelu", activation(nn.GELU())),
    "quick GELU in the SD 2.1 text encoder": ("gelu", activation(clip.QuickGELU())),
    "tanh GELU in the SD 2.1 text encoder": ("gelu", activation(TanhGELU())),
}


ODD_SIZES = {"nearest-exact upsampling": (16, 13)}  # has no effect where sizes double exactly


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_fails_with_this_mistake(
    name: str, monkeypatch: pytest.MonkeyPatch, record_slip: Callable[[str, float], None]
) -> None:
    kind, mistake = MISTAKES[name]
    ours, pairs = networks(kind, ODD_SIZES.get(name, (8, 16)))
    with torch.no_grad():
        assert worst(pairs()) <= 1e-9
        mistake(monkeypatch, ours)
        found = worst(pairs())
    record_slip(name, found)
    assert found > 1e-6


@pytest.mark.parametrize("kind", [*UNETS, *VAES, *TEXTS])
def test_every_parameter_affects_an_output(kind: str) -> None:
    """Every parameter has a gradient: one that is loaded but not used has none.

    The bias of keys is exempt: it adds the same to all scores of a query, and softmax cancels it.
    """
    ours, pairs = networks(kind)
    for parameter in ours.parameters():
        parameter.requires_grad_(True)
    torch.stack([(x * random(*x.shape, seed=4)).sum() for x, _ in pairs().values()]).sum().backward()
    unused = [
        name
        for name, parameter in ours.named_parameters()
        if not name.endswith(("to_k.bias", "k_proj.bias"))
        and (parameter.grad is None or parameter.grad.abs().max() < 1e-6)
    ]
    assert unused == []
