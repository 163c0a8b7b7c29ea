"""The authors' program as a user of diffusers writes it, to compare the cost of an edit with.

The work is that of github.com/Yujun-Shi/DragDiffusion: a LoRA by peft on four projections with a VAE encoding
in each training step, features by hooks, and the pair of original and edit denoised as one batch. The drag
itself is `dragdiffusion`, which asks for no more than a noise predictor.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from minidrag import images
from minidrag.bench.cases import Case
from minidrag.config import EditConfig
from minidrag.edit import prepare
from minidrag.method.ddim import Denoiser, Schedule, invert
from minidrag.method.dragdiffusion import dragdiffusion
from minidrag.method.progress import Progress
from minidrag.model import Model, working_size
from minidrag.networks.unet import KeysValues

LAST_BLOCKS = ("up_blocks.2.", "up_blocks.3.")  # whose self-attention reads the original


def load_pipeline(model: Model) -> Any:
    """The diffusers pipeline of a local model, on its device and in its dtype."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(model.source)
    for network in (pipeline.unet, pipeline.vae):
        network.requires_grad_(False)
    return pipeline.to(model.device, model.dtype)


def edit(model: Model, pipeline: Any, case: Case, config: EditConfig, progress: Progress) -> Tensor:
    """Make one edit; return the latents (2, 4, H, W) of the original and the edit."""
    unet = pipeline.unet
    vae = pipeline.vae
    schedule = model.schedule
    text = model.encode_text(case.prompt)
    mask = torch.from_numpy(case.mask)
    _, task = prepare(model, case.before.size, case.handles, case.targets, mask, config)
    resized = images.resize(case.before, working_size(model, case.before.size, config))
    pixels = images.to_tensor(resized).to(model.device, model.dtype)
    list(progress("LoRA", train(unet, vae, schedule, pixels, text, config), config.lora_steps))
    with torch.no_grad():
        clean = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    denoiser = Denoiser(predictor(unet), schedule, text, config.steps)
    inversion = invert(denoiser, clean, config.levels)
    path = [clean, *progress("inversion", inversion, config.levels)]
    *_, last = progress("drag", dragdiffusion(denoiser, path, task, config), config.most_updates)
    pair = torch.cat([path[-1], last.latent])
    *_, pair = progress("denoising", denoise_pair(unet, schedule, pair, text, config), config.levels)
    unet.delete_adapters("default")
    return pair


def train(
    unet: Any, vae: Any, schedule: Schedule, pixels: Tensor, text: Tensor, config: EditConfig
) -> Iterator[float]:
    """Train a LoRA by peft, encoding the image anew in every step; yield the losses."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    rank = config.lora_rank
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
    )
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=config.lora_lr)
    for _ in range(config.lora_steps):
        batch = vae.encode(pixels).latent_dist.sample().expand(config.lora_batch, -1, -1, -1)
        noise = torch.randn_like(batch)
        timestep = torch.randint(schedule.num_train_timesteps, (len(batch),), device=batch.device)
        noisy = schedule.add_noise(vae.config.scaling_factor * batch, noise, timestep)
        predicted = unet(noisy, timestep, encoder_hidden_states=text.expand(len(batch), -1, -1)).sample
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
    for parameter in learned:
        parameter.requires_grad_(False)


def predictor(unet: Any) -> Any:
    """A diffusers UNet as a NoisePredictor whose features come by hooks; it has no keys and values."""

    def predict(latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None):
        features: list[Tensor] = []
        keep = [
            block.register_forward_hook(lambda *seen: features.append(seen[2])) for block in unet.up_blocks
        ]
        noise = unet(latent.to(text.dtype), timestep, encoder_hidden_states=text).sample
        for hook in keep:
            hook.remove()
        return noise, features, []

    return predict


@torch.no_grad()
def denoise_pair(
    unet: Any, schedule: Schedule, pair: Tensor, text: Tensor, config: EditConfig
) -> Iterator[Tensor]:
    """Denoise an original and its edit as one batch; the edit attends to the original's keys and values."""
    before = dict(unet.attn_processors)
    shared = {name: SharedAttention() for name in before if name.startswith(LAST_BLOCKS) and "attn1" in name}
    unet.set_attn_processor(before | shared)
    times = [schedule.timestep(level, config.steps) for level in range(config.levels, -1, -1)]
    for time, below in pairwise(times):
        noise = unet(pair.to(text.dtype), time, encoder_hidden_states=text.expand(2, -1, -1)).sample
        pair = schedule.step(pair, noise, time, below)
        yield pair
    unet.set_attn_processor(before)


class SharedAttention:
    """Attention processor in which a whole batch attends to the keys and values of its first sample."""

    def __call__(self, attention: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        layers: Any = attention
        query = layers.to_q(hidden_states)
        keys, values = (layer(hidden_states[:1]).expand_as(query) for layer in (layers.to_k, layers.to_v))
        heads = [x.unflatten(2, (layers.heads, -1)).transpose(1, 2) for x in (query, keys, values)]
        output = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # (B, tokens, C)
        return layers.to_out[0](output)
