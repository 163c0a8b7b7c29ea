"""LoRA: initial values, attaching and detaching, and training step for step against peft."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from support.loras import (
    ATTENTION,
    LOCON,
    TEXT_ENCODER,
    TINY_UNET,
    Models,
    build_models,
    merged_weights,
    outputs,
    random_factors,
    tiny_unet,
    unet_inputs,
)
from support.references import SD15_UNET, our_unet, prompt_tokens, random, reference_unet, same_weights
from torch import Generator, Tensor, nn
from torch.func import functional_call

from minidrag.config import EditConfig
from minidrag.method import lora
from minidrag.method.ddim import Schedule
from minidrag.method.lora import (
    Factors,
    LoRA,
    LoRALayer,
    Moments,
    initialize,
    lora_attached,
    lora_layers,
    target_layers,
)
from minidrag.method.progress import Progress
from minidrag.networks.unet import UNet

Compare = Callable[..., None]
SCHEDULE = Schedule()
CONFIG = EditConfig(
    lora_rank=4, lora_targets="qkvo", lora_steps=4, lora_batch=3, lora_lr=1e-2, lora_lr_ratio=3.0
)
NO_TEXT_ENCODER = nn.Module()
NO_LORA = LoRA({}, {})


@cache
def shared_models() -> Models:
    """Cached, since no test changes them."""
    return build_models()


def named_modules(models: Models) -> list[list[tuple[str, nn.Module]]]:
    return [list(model.named_modules()) for model in (models.unet, models.text_encoder)]


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


# Initial values.


@pytest.mark.parametrize(("targets", "count"), [("qk", 64), ("qkv", 96), ("qkvo", 128)])
def test_an_untrained_lora_changes_nothing_and_leaves_no_trace(targets: str, count: int) -> None:
    models = shared_models()
    modules, state = list(models.unet.named_modules()), models.unet.state_dict()
    before = outputs(models, NO_LORA)[0]
    untrained = initialize(models.unet, 4, targets, seeded())
    assert list(models.unet.named_modules()) == modules
    with lora_attached(models.unet, models.text_encoder, untrained):
        layers = lora_layers(models.unet)
        assert layers.keys() == untrained.unet.keys()
        assert len(layers) == count and all(".attn" in path for path in layers)
        assert not lora_layers(models.text_encoder)
    assert torch.equal(outputs(models, untrained)[0], before)
    assert list(models.unet.named_modules()) == modules  # the very same objects under the same names
    after = models.unet.state_dict()
    assert after.keys() == state.keys()
    assert all(after[name].data_ptr() == state[name].data_ptr() for name in state)
    assert torch.equal(outputs(models, NO_LORA)[0], before)


def test_the_official_size() -> None:
    entries = initialize(our_unet(SD15_UNET), 16, "qkvo", seeded()).unet
    assert sum(factors.down.numel() + factors.up.numel() for factors in entries.values()) == 3_188_736


def test_initial_values() -> None:
    unet = tiny_unet(torch.float16)
    with lora_attached(unet, NO_TEXT_ENCODER, initialize(unet, 32, "qkvo", seeded())):
        layers = lora_layers(unet).values()
    down = torch.cat([layer.down.flatten() for layer in layers])
    assert len(down) > 30_000 and down.dtype == torch.float32
    assert abs(down.mean().item()) < 4 / 32 / len(down) ** 0.5
    assert abs(down.std().item() * 32 - 1) < 4 / (2 * len(down)) ** 0.5
    assert all(not layer.up.any() and layer.alpha == 32 and layer.scale == 1 for layer in layers)
    assert not any(parameter.requires_grad for layer in layers for parameter in (layer.down, layer.up))


# Attaching and detaching.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_layer_keeps_its_dtype_and_the_lora_its_precision(dtype: torch.dtype) -> None:
    for base, x in (
        (nn.Linear(6, 5), random(2, 3, 6, seed=1, dtype=dtype)),
        (nn.Conv2d(6, 5, 3, stride=2, padding=1), random(2, 6, 7, 4, seed=1, dtype=dtype)),
    ):
        size = base.weight.shape[2:]
        factors = Factors(random(3, 6, *size, seed=2), random(5, 3, *[1] * len(size), seed=3), 1.5)
        layer = LoRALayer(base.to(dtype), factors)
        wider = torch.float64 if dtype == torch.float64 else torch.float32
        assert layer.down.dtype == layer.up.dtype == wider
        change = 0.5 * (factors.up.flatten(1) @ factors.down.flatten(1)).reshape(base.weight.shape)
        assert base.bias is not None
        weight, bias = base.weight.detach().double() + change, base.bias.detach().double()
        expected = functional_call(base.double(), {"weight": weight, "bias": bias}, x.double())
        base.to(dtype)
        found = layer(x)
        bound = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
        assert found.dtype == dtype and (found - expected).abs().max() < bound


def test_an_attached_lora_gives_the_outputs_and_gradients_of_merged_weights(compare: Compare) -> None:
    models = shared_models()
    unet, text_encoder = models.unet, models.text_encoder
    both = LoRA(random_factors(unet, LOCON, 18), random_factors(text_encoder, TEXT_ENCODER, 19))
    merged, text_merged = merged_weights(unet, both.unet), merged_weights(text_encoder, both.text_encoder)
    latent, timestep, text = unet_inputs()
    leaf, tokens = latent.clone().requires_grad_(), prompt_tokens(120)

    def noise_and_gradient(noise: Tensor) -> tuple[Tensor, Tensor]:
        return noise.detach(), torch.autograd.grad(noise.square().sum(), leaf)[0]

    expected = noise_and_gradient(functional_call(unet, merged, (leaf, timestep, text)).noise)
    expected_text = functional_call(text_encoder, text_merged, (tokens,))
    with lora_attached(unet, text_encoder, both):
        found, found_text = noise_and_gradient(unet(leaf, timestep, text).noise), text_encoder(tokens)
    for name, *pair in zip(("noise", "gradient"), found, expected, strict=True):
        compare(f"LoRA, attached against merged: {name}", *pair)
    compare("LoRA, attached against merged: text", found_text, expected_text)


def test_an_attached_lora_can_be_extracted() -> None:
    models = shared_models()
    attached = LoRA(random_factors(models.unet, LOCON, 18), {})
    with lora_attached(models.unet, models.text_encoder, attached):
        extracted = lora.extract(models.unet)
        for layer in lora_layers(models.unet).values():
            layer.up.zero_()
    assert extracted.unet.keys() == attached.unet.keys() and not extracted.text_encoder
    for path, (down, up, alpha) in attached.unet.items():
        found = extracted.unet[path]
        assert torch.equal(found.down.float(), down) and torch.equal(found.up.float(), up)
        assert found.alpha == alpha == 5


def test_layers_have_the_same_paths_with_a_lora_as_without() -> None:
    models = shared_models()
    before = target_layers(models.unet)
    with lora_attached(models.unet, models.text_encoder, LoRA(random_factors(models.unet, LOCON, 18), {})):
        assert target_layers(models.unet) == before
    assert target_layers(models.unet) == before


def test_a_second_lora_is_refused_and_the_first_one_stays() -> None:
    models = shared_models()
    modules = named_modules(models)
    on_unet = LoRA(random_factors(models.unet, ATTENTION, 17), {})
    on_text_encoder = LoRA({}, random_factors(models.text_encoder, TEXT_ENCODER, 17))
    for first in (on_unet, on_text_encoder):
        with lora_attached(models.unet, models.text_encoder, first):
            attached = named_modules(models)
            for second in (on_unet, on_text_encoder):
                refused = pytest.raises(ValueError, match="the model has a LoRA already: detach it first")
                with refused, lora_attached(models.unet, models.text_encoder, second):
                    pass
                assert named_modules(models) == attached != modules
        assert named_modules(models) == modules


def test_an_error_leaves_the_networks_without_a_lora() -> None:
    models = shared_models()
    modules = named_modules(models)
    both = LoRA(
        random_factors(models.unet, ATTENTION, 17), random_factors(models.text_encoder, TEXT_ENCODER, 17)
    )
    with pytest.raises(KeyboardInterrupt), lora_attached(models.unet, models.text_encoder, both):
        raise KeyboardInterrupt
    assert named_modules(models) == modules
    absent = {"absent": both.unet["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]}
    for part in (LoRA(both.unet | absent, {}), LoRA(both.unet, both.text_encoder | absent)):
        refused = pytest.raises(ValueError, match="layer absent does not exist")
        with refused, lora_attached(models.unet, models.text_encoder, part):
            pass
        assert named_modules(models) == modules


# Training.


class Given(NamedTuple):
    """Inputs of a training on one image."""

    moments: Moments
    text: Tensor


def image(dtype: torch.dtype = torch.float64) -> Given:
    mean, spread = random(1, 4, 12, 9, seed=20, dtype=dtype), random(1, 4, 12, 9, seed=21, dtype=dtype)
    text = random(1, 7, TINY_UNET["cross_attention_dim"], seed=22, dtype=dtype)
    return Given((mean, 0.1 * spread.exp()), text)


def train(unet: UNet, given: Given, config: EditConfig = CONFIG, seed: int = 0) -> tuple[LoRA, list[float]]:
    """Train a LoRA as `edit.train_lora` does, and return the losses too."""
    generator = seeded(seed)
    untrained = initialize(unet, config.lora_rank, config.lora_targets, generator)
    with lora_attached(unet, NO_TEXT_ENCODER, untrained):
        losses = lora.train(unet, SCHEDULE, *given, config, generator)
        losses = list(Progress()("LoRA", losses, config.lora_steps))
        return lora.extract(unet), losses


def test_training_equals_peft_step_for_step(compare: Compare) -> None:
    """Against a loop written here, on diffusers' UNet with peft's LoRA and its gradients."""
    unet, reference = our_unet(TINY_UNET), reference_unet(TINY_UNET)
    assert isinstance(unet, UNet) and isinstance(reference, UNet2DConditionModel)
    same_weights(reference, unet, torch.float64)
    (mean, std), text = given = image()
    trained, losses = train(unet, given, seed=7)

    def weight(path: str, factor: str) -> nn.Parameter:
        """A factor of peft's LoRA; `factor` is lora_A or lora_B."""
        layer: Any = reference.get_submodule(path)
        return getattr(layer, factor)["ours"].weight

    generator = seeded(7)
    untrained = initialize(unet, CONFIG.lora_rank, CONFIG.lora_targets, generator).unet
    reference.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION)), "ours")
    for path, (down, up, _) in untrained.items():
        weight(path, "lora_A").data = down.double()
        weight(path, "lora_B").data = up.double()
    named = {name: weight for name, weight in reference.named_parameters() if "lora_" in name}
    assert len(named) == 2 * len(untrained) == 2 * len(trained.unet)
    rates = {name: 3e-2 if "lora_B" in name else 1e-2 for name in named}
    groups = [{"params": [weight], "lr": rates[name]} for name, weight in named.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32).square()
    alphas_cumprod = torch.cumprod(1 - betas, 0).double()
    assert len(losses) == CONFIG.lora_steps == 4
    for found in losses:
        latent, timestep, noise = lora.sample_batch(SCHEDULE, (mean, std), 3, generator)
        a = alphas_cumprod[timestep][:, None, None, None]
        noisy = a**0.5 * latent + (1 - a) ** 0.5 * noise
        predicted = reference(noisy, timestep, text.repeat(3, 1, 1)).sample
        loss = ((predicted - noise) ** 2).mean()
        assert abs(loss.item() - found) < 1e-9
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for factor, ours in (
        ("lora_A", {path: factors.down for path, factors in trained.unet.items()}),
        ("lora_B", {path: factors.up for path, factors in trained.unet.items()}),
    ):
        theirs = torch.cat([weight(path, factor).flatten() for path in ours])
        compare(
            f"LoRA, trained against peft: {factor}", torch.cat([x.flatten() for x in ours.values()]), theirs
        )


def test_the_loss_is_the_mean_over_samples_of_different_timesteps() -> None:
    unet, (moments, text) = tiny_unet(), image()
    latent, _, noise = lora.sample_batch(SCHEDULE, moments, 3, seeded(1))
    timesteps = [0, 500, 999]
    loss = lora.noise_loss(unet, SCHEDULE, latent, torch.tensor(timesteps), noise, text)
    alphas_cumprod, alpha = [], 1.0
    for t in range(1000):
        alpha *= 1 - (0.00085**0.5 + t / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        alphas_cumprod.append(alpha)
    squares = []
    for z, t, eps in zip(latent, timesteps, noise, strict=True):
        noisy = math.sqrt(alphas_cumprod[t]) * z + math.sqrt(1 - alphas_cumprod[t]) * eps
        squares.append((unet(noisy[None], t, text).noise - eps).square().flatten())
    expected = torch.cat(squares).mean()
    assert abs(loss.item() / expected.item() - 1) < 1e-6  # the schedule is float32


def test_every_sample_of_every_batch_is_drawn_independently() -> None:
    (mean, std), _ = image()
    generator = seeded(2)
    batches = [lora.sample_batch(SCHEDULE, (mean, std), 50, generator) for _ in range(40)]
    latent, timestep, noise = (torch.cat(x) for x in zip(*batches, strict=True))
    standardized = (latent - mean) / std
    for x in (standardized, noise):
        assert len(x.unique(dim=0)) == 2000 and abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((standardized * noise).mean()) < 0.02
    assert timestep.min() < 5 and timestep.max() > 994 and timestep.max() < 1000
    assert abs(timestep.double().mean() - 499.5) < 4 * 289 / 2000**0.5


def test_training_lowers_the_loss_and_touches_nothing_but_the_lora() -> None:
    unet, given = tiny_unet(torch.float32), image(torch.float32)
    flags = {name: i % 2 == 0 for i, (name, _) in enumerate(unet.named_parameters())}
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(flags[name])
    parameters, before = dict(unet.named_parameters()), {k: x.clone() for k, x in unet.state_dict().items()}
    modules = list(unet.named_modules())
    latent, timestep, noise = lora.sample_batch(SCHEDULE, given.moments, 64, seeded(99))

    @torch.no_grad()
    def loss() -> float:
        return lora.noise_loss(unet, SCHEDULE, latent, timestep, noise, given.text).item()

    generator, losses, without = seeded(), [], loss()
    config = replace(CONFIG, lora_steps=24, lora_lr=2e-2, lora_lr_ratio=1.0)
    with lora_attached(unet, NO_TEXT_ENCODER, initialize(unet, 4, "qkvo", generator)):
        factors = {f"{path}.{factor}" for path in lora_layers(unet) for factor in ("down", "up")}
        for value in lora.train(unet, SCHEDULE, *given, config, generator):
            losses.append(value)
            inside = dict(unet.named_parameters())
            assert {name for name, parameter in inside.items() if parameter.grad is not None} == factors
            others = {name: x.requires_grad for name, x in inside.items() if name not in factors}
            assert {name.replace(".base.", "."): flag for name, flag in others.items()} == flags
        trained, with_lora = lora.extract(unet), loss()
    assert len(losses) == 24 and all(math.isfinite(value) for value in losses)
    assert with_lora < 0.95 * without
    assert not unet.training and all(factors.up.any() for factors in trained.unet.values())
    assert not any(x.requires_grad for factors in trained.unet.values() for x in factors[:2])
    assert list(unet.named_modules()) == modules
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == flags
    assert all(parameter is parameters[name] for name, parameter in unet.named_parameters())
    assert all(torch.equal(x, before[name]) for name, x in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert loss() == without
    with lora_attached(unet, NO_TEXT_ENCODER, trained):
        assert loss() == with_lora


def test_training_depends_on_its_seed_alone() -> None:
    unet, given = tiny_unet(torch.float32), image(torch.float32)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))  # the global generator must not matter
        results.append(train(unet, given, seed=seed)[0].unet)
    first, same, other = results
    assert all(torch.equal(first[path].up, same[path].up) for path in first)
    assert not any(torch.equal(first[path].up, other[path].up) for path in first)


def test_training_works_under_no_grad_and_with_checkpointing() -> None:
    unet, given = tiny_unet(torch.float32), image(torch.float32)
    expected = train(unet, given)[0].unet
    with torch.no_grad():
        under_no_grad = train(unet, given)[0].unet
    unet.checkpointing = True
    checkpointed = train(unet, given)[0].unet
    for path, factors in expected.items():
        assert torch.equal(under_no_grad[path].up, factors.up)
        assert torch.equal(checkpointed[path].up, factors.up)


def test_training_leaves_the_gradient_mode_to_its_consumer() -> None:
    unet, given = tiny_unet(torch.float32), image(torch.float32)
    untrained = initialize(unet, 4, "qk", seeded())
    with torch.no_grad(), lora_attached(unet, NO_TEXT_ENCODER, untrained):
        for _ in lora.train(unet, SCHEDULE, *given, CONFIG, seeded()):
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_on_a_half_precision_unet_keeps_the_lora_in_float32(dtype: torch.dtype) -> None:
    exact, half = tiny_unet(torch.float32), tiny_unet(torch.float32).to(dtype)
    given = image(torch.float32)
    config = EditConfig(lora_rank=4, lora_targets="qkvo", lora_steps=1, lora_batch=3, lora_lr=1e-2)
    expected = train(exact, given, config)[0].unet
    found = train(half, Given(given.moments, given.text.to(dtype)), config)[0].unet
    # Adam's first step is the sign of the gradient: of those that count, nearly all are the same.
    same = [(expected[path].up.sign() == found[path].up.sign()).float().mean().item() for path in expected]
    assert sum(same) / len(same) > 0.9
    assert all(factors.up.dtype == torch.float32 for factors in found.values())
    assert all(parameter.dtype == dtype for parameter in half.parameters())


def test_a_loss_that_is_not_finite_stops_training_and_leaves_no_lora() -> None:
    unet, ((mean, std), text) = tiny_unet(torch.float32), image(torch.float32)
    modules = list(unet.named_modules())
    with pytest.raises(FloatingPointError, match="^LoRA: a number is not finite after 1 of 4$"):
        train(unet, Given((mean, std * math.nan), text))
    assert list(unet.named_modules()) == modules


def test_interrupted_training_leaves_no_lora() -> None:
    unet, given = tiny_unet(torch.float32), image(torch.float32)
    modules = list(unet.named_modules())
    flags = [parameter.requires_grad for parameter in unet.parameters()]
    untrained = initialize(unet, 4, "qkvo", seeded())
    with pytest.raises(KeyboardInterrupt), lora_attached(unet, NO_TEXT_ENCODER, untrained):
        for step, _ in enumerate(lora.train(unet, SCHEDULE, *given, CONFIG, seeded()), 1):
            if step == 2:
                raise KeyboardInterrupt
    assert list(unet.named_modules()) == modules
    assert [parameter.requires_grad for parameter in unet.parameters()] == flags
    assert all(parameter.grad is None for parameter in unet.parameters())
