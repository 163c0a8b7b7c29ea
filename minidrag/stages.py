"""What surrounds the stages of an edit: the LoRA put on, memory set free, time taken, numbers watched."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method import lora
from minidrag.method.lora import LoRA
from minidrag.networks.unet import UNet
from minidrag.weights.model import Model

OnStage = Callable[[str, int, int], None]  # called with a stage's name, its steps done, and all its steps


@contextmanager
def lora_attached(model: Model, trained: LoRA, config: EditConfig) -> Iterator[None]:
    """Within it the model wears the LoRA, and its UNet saves memory if so configured."""
    lora.attach(model.unet, trained, model.text_encoder)
    try:
        with checkpointing(model.unet, config.checkpointing):
            yield
    finally:
        lora.remove(model.unet)
        lora.remove(model.text_encoder)


@contextmanager
def checkpointing(unet: UNet, wanted: bool) -> Iterator[None]:
    """Within it the UNet recomputes its blocks in the backward pass, or does not, whatever it did before."""
    before, unet.checkpointing = unet.checkpointing, wanted
    try:
        yield
    finally:
        unet.checkpointing = before


@contextmanager
def only_unet_on_device(model: Model) -> Iterator[None]:
    """Within it only the UNet is on the device: the other networks would fill its memory for nothing."""
    networks, device = (model.vae, model.text_encoder), model.device
    for network in networks:
        network.to("cpu")
    try:
        yield
    finally:
        for network in networks:
            network.to(device)


@contextmanager
def stage(
    name: str, total: int, seconds: dict[str, float], on_stage: OnStage | None
) -> Iterator[Callable[[int, Any], None]]:
    """Times a stage; yields what to call after each step, with the step's number and its latent or loss."""

    def on_step(done: int, value: Tensor | float) -> None:
        must_be_finite(value, name, f" in step {done} of {total}")
        if on_stage:
            on_stage(name, done, total)

    began = time.perf_counter()
    if on_stage:
        on_stage(name, 0, total)  # a first step can take long: what is under way shows at once
    yield on_step
    seconds[name] = time.perf_counter() - began


def must_be_finite(numbers: Tensor | float, name: str, place: str = "") -> None:
    """Raises FloatingPointError, with a stage's name and a place in it, for infinity and not-a-number."""
    if not torch.as_tensor(numbers).isfinite().all():
        raise FloatingPointError(f"{name}: a number is no longer finite{place}")
