"""Exercises on the networks: attention with reference keys and values, the timestep, padding."""

import torch
from torch import Generator

from minidrag.course.exercise import Exercise, Inputs, Slip, filled, normal, whole
from minidrag.networks.layers import Attention, Downsample
from minidrag.networks.unet import TimestepEmbedding


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


KEY_VALUE = Exercise(
    "key_value",
    Attention.forward,
    attention_inputs,
    (
        Slip(
            "reference keys and values ignored",
            "If there is a `key_value`, attend to it and not to the layer's own.",
            {"key_value or ": ""},
        ),
        Slip(
            "keys replaced, values not",
            "Take both from `key_value`: keys say where to look, values what is seen there.",
            {"    return": "    value = self.to_v(context)\n    return"},
        ),
        Slip(
            "keys and values swapped",
            "The pair is (key, value), in this order.",
            {"key, value, self.heads": "value, key, self.heads"},
        ),
        Slip(
            "appended to the layer's own",
            "`key_value` replaces the layer's own; with both, the edit would attend to itself too.",
            {
                "    return": "    if key_value:\n"
                "        key = torch.cat([self.to_k(context), key], dim=1)\n"
                "        value = torch.cat([self.to_v(context), value], dim=1)\n"
                "    return",
            },
        ),
        Slip(
            "own keys and values returned",
            "Return the pair that was used.",
            {"self.heads)), (key, value)": "self.heads)), (self.to_k(context), self.to_v(context))"},
        ),
        Slip(
            "scaled by all channels",
            "d in softmax(Q K^T / sqrt(d)) is the width of one head, C / heads.",
            {"self.to_q(tokens)": "self.to_q(tokens) / self.heads**0.5"},
        ),
    ),
    returns=("tokens", "keys and values"),
)


def embedding_inputs(rng: Generator) -> list[Inputs]:
    calls: list[Inputs] = []
    for channels in (8, 10):
        layer = filled(TimestepEmbedding(channels, 6), rng)
        times = torch.tensor([whole(rng, 0, 5), whole(rng, 100, 500), 999])
        calls.append({"layer": layer, "timestep": times, "dtype": torch.float64})
    return calls


TIME_EMBEDDING = Exercise(
    "time_embedding",
    TimestepEmbedding.forward,
    embedding_inputs,
    (
        Slip(
            "sine before cosine",
            "Stable Diffusion has the cosines first, unlike the original transformer.",
            {"angle.cos(), angle.sin()": "angle.sin(), angle.cos()"},
        ),
        Slip(
            "cosines and sines interleaved",
            "First all cosines, then all sines.",
            {"torch.cat(": "torch.stack(", "dim=1)": "dim=2).flatten(1)"},
        ),
        Slip(
            "one frequency too few",
            "Divide the index by half, not by half - 1: the lowest frequency is not quite 1 / 10000.",
            {"/ half": "/ (half - 1)"},
        ),
        Slip(
            "no SiLU between the linear layers",
            "Without it the two linear layers are just one.",
            {"silu": ""},
        ),
    ),
    tolerance=1e-3,  # float32 angles up to 999 are right to 3e-5
)


def padding_inputs(rng: Generator) -> list[Inputs]:
    vae = ((False, size) for size in ((6, 8), (7, 5), (4, 7)))
    unet = ((True, size) for size in ((6, 8), (7, 5)))
    return [
        {"layer": filled(Downsample(3, symmetric), rng), "hidden": normal(rng, 2, 3, *size, grad=True)}
        for symmetric, size in (*vae, *unet)
    ]


PADDING = Exercise(
    "padding",
    Downsample.forward,
    padding_inputs,
    (
        Slip(
            "symmetric padding",
            "The VAE pads on the right and the bottom only; on all sides shifts the image by half a pixel.",
            {"(0, 1, 0, 1)": "(1, 1, 1, 1)"},
        ),
        Slip(
            "padding on the left and the top",
            "F.pad wants left, right, top, bottom: (0, 1, 0, 1).",
            {"(0, 1, 0, 1)": "(1, 0, 1, 0)"},
        ),
        Slip(
            "no padding",
            "Without a column and a row of zeros the convolution leaves out the border.",
            {"F.pad(hidden, (0, 1, 0, 1))": "hidden"},
        ),
        Slip(
            "UNet padded twice",
            "With layer.symmetric the convolution pads by itself.",
            {"hidden if self.symmetric else ": ""},
        ),
    ),
)
