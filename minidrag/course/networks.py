"""Exercises on the networks: attention with reference keys and values, the timestep, padding."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from minidrag.course.exercise import Exercise, Function, Inputs, Slip, normal, whole
from minidrag.networks.layers import Attention, Downsample, KeyValue, attention
from minidrag.networks.unet import TimestepEmbedding

# Bound here, so that a slip still has the project's own while another function is in its place.
attend = Attention.forward
embed = TimestepEmbedding.forward
downsample = Downsample.forward


def filled(layer: Any, rng: Generator) -> Any:
    """A layer with random parameters, float64, without gradients."""
    layer = layer.double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(normal(rng, *parameter.shape))
    return layer


def attention_inputs(rng: Generator) -> list[Inputs]:
    calls: list[Inputs] = []
    for heads, words, injected in ((2, 0, 5), (3, 4, 0), (2, 0, 0)):  # lengths of context and pair; 0: none
        tokens = normal(rng, 2, 5, 6, grad=True)
        layer = filled(Attention(6, 6, heads, bias=False), rng)
        pair = None
        if injected:
            pair = normal(rng, 2, injected, 6, grad=True), normal(rng, 2, injected, 6, grad=True)
        context = normal(rng, 2, words, 6, grad=True) if words else tokens
        calls.append({"layer": layer, "tokens": tokens, "context": context, "key_value": pair})
    return calls


def own_pair(layer: Attention, context: Tensor) -> KeyValue:
    return layer.to_k(context), layer.to_v(context)


def keys_alone(layer: Attention, tokens: Tensor, context: Tensor, pair: KeyValue | None = None) -> Any:
    return attend(layer, tokens, context, pair and (pair[0], layer.to_v(context)))


def appended(layer: Attention, tokens: Tensor, context: Tensor, pair: KeyValue | None = None) -> Any:
    if pair is not None:
        key, value = own_pair(layer, context)
        pair = torch.cat([key, pair[0]], 1), torch.cat([value, pair[1]], 1)
    return attend(layer, tokens, context, pair)


def always_swapped(layer: Attention, tokens: Tensor, context: Tensor, pair: KeyValue | None = None) -> Any:
    """The layer's own too, and returned in the right order."""
    key, value = pair or own_pair(layer, context)
    return attend(layer, tokens, context, (value, key))[0], (key, value)


def wide_scale(layer: Attention, tokens: Tensor, context: Tensor, pair: KeyValue | None = None) -> Any:
    key, value = pair or own_pair(layer, context)
    query = layer.to_q(tokens) / math.sqrt(layer.heads)  # 1 / sqrt(C) instead of 1 / sqrt(C / heads)
    return layer.to_out(attention(query, key, value, layer.heads)), (key, value)


KEY_VALUE = Exercise(
    "key_value",
    attend,
    attention_inputs,
    (
        Slip(
            "reference keys and values ignored",
            "If there is a `key_value`, attend to it and not to the layer's own.",
            lambda layer, tokens, context, pair=None: attend(layer, tokens, context),
        ),
        Slip(
            "keys replaced, values not",
            "Take both from `key_value`: keys say where to look, values what is seen there.",
            keys_alone,
        ),
        Slip(
            "keys and values swapped",
            "The pair is (key, value), in this order.",
            always_swapped,
        ),
        Slip(
            "appended to the layer's own",
            "`key_value` replaces the layer's own; with both, the edit would attend to itself too.",
            appended,
        ),
        Slip(
            "own keys and values returned",
            "Return the pair that was used.",
            lambda layer, tokens, context, pair=None: (
                attend(layer, tokens, context, pair)[0],
                own_pair(layer, context),
            ),
        ),
        Slip(
            "scaled by all channels",
            "d in softmax(Q K^T / sqrt(d)) is the width of one head, C / heads.",
            wide_scale,
        ),
    ),
    ("minidrag.networks.layers.Attention.forward",),
    returns=("tokens", "keys and values"),
)


def embedding_inputs(rng: Generator) -> list[Inputs]:
    calls: list[Inputs] = []
    for channels in (8, 10):
        layer = filled(TimestepEmbedding(channels, 6), rng)
        times = torch.tensor([whole(rng, 0, 5), whole(rng, 100, 500), 999])
        calls.append({"layer": layer, "timestep": times, "dtype": torch.float64})
    return calls


def waves(layer: TimestepEmbedding, timestep: Tensor, less: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (B, channels / 2)."""
    half = layer.channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - less)
    angle = timestep.float()[:, None] * exponent.exp().to(timestep.device)
    return angle.cos(), angle.sin()


def embedding_of(join: Callable[[TimestepEmbedding, Tensor], Tensor]) -> Function:
    """An embedding with other waves, (B, channels)."""
    return lambda layer, timestep, dtype: layer.linear_2(
        F.silu(layer.linear_1(join(layer, timestep).to(dtype)))
    )


TIME_EMBEDDING = Exercise(
    "time_embedding",
    embed,
    embedding_inputs,
    (
        Slip(
            "sine before cosine",
            "Stable Diffusion has the cosines first, unlike the original transformer.",
            embedding_of(lambda layer, timestep: torch.cat(waves(layer, timestep)[::-1], dim=1)),
        ),
        Slip(
            "cosines and sines interleaved",
            "First all cosines, then all sines.",
            embedding_of(lambda layer, timestep: torch.stack(waves(layer, timestep), dim=2).flatten(1)),
        ),
        Slip(
            "one frequency too few",
            "Divide the index by half, not by half - 1: the lowest frequency is not quite 1 / 10000.",
            embedding_of(lambda layer, timestep: torch.cat(waves(layer, timestep, less=1), dim=1)),
        ),
        Slip(
            "no SiLU between the linear layers",
            "Without it the two linear layers are just one.",
            lambda layer, timestep, dtype: layer.linear_2(
                layer.linear_1(torch.cat(waves(layer, timestep), dim=1).to(dtype))
            ),
        ),
    ),
    ("minidrag.networks.unet.TimestepEmbedding.forward",),
    tolerance=1e-3,  # float32 angles up to 999 are right to 3e-5
)


def padding_inputs(rng: Generator) -> list[Inputs]:
    vae = ((False, size) for size in ((6, 8), (7, 5), (4, 7)))
    unet = ((True, size) for size in ((6, 8), (7, 5)))
    return [
        {"layer": filled(Downsample(3, symmetric), rng), "hidden": normal(rng, 2, 3, *size, grad=True)}
        for symmetric, size in (*vae, *unet)
    ]


def padded(layer: Downsample, hidden: Tensor, *sides: int) -> Tensor:
    """The convolution after padding the VAE's layer on the left, right, top, and bottom."""
    return layer.conv(hidden if layer.symmetric else F.pad(hidden, sides))


PADDING = Exercise(
    "padding",
    downsample,
    padding_inputs,
    (
        Slip(
            "symmetric padding",
            "The VAE pads on the right and the bottom only; on all sides shifts the image by half a pixel.",
            lambda layer, hidden: padded(layer, hidden, 1, 1, 1, 1),
        ),
        Slip(
            "padding on the left and the top",
            "F.pad wants left, right, top, bottom: (0, 1, 0, 1).",
            lambda layer, hidden: padded(layer, hidden, 1, 0, 1, 0),
        ),
        Slip(
            "no padding",
            "Without a column and a row of zeros the convolution leaves out the border.",
            lambda layer, hidden: padded(layer, hidden, 0, 0, 0, 0),
        ),
        Slip(
            "UNet padded twice",
            "With layer.symmetric the convolution pads by itself.",
            lambda layer, hidden: layer.conv(F.pad(hidden, (0, 1, 0, 1))),
        ),
    ),
    ("minidrag.networks.layers.Downsample.forward",),
)
