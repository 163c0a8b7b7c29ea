"""Trains the small model that ships: a latent diffusion model of rendered scenes, from nothing.

    python -m minidrag.tiny.train OUT        # --help tells the rest

First the autoencoder, then the UNet together with the text encoder. Every random draw of a step comes from
the seed and the step's number, so a run that was stopped goes on from its checkpoint to the same numbers.
With --start FOLDER the autoencoder and the vocabulary are an earlier model's, and its UNet and text encoder
are trained on.
"""

import argparse
import copy
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from minidrag.method.ddim import Schedule
from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE, VAEConfig
from minidrag.tiny import folder, vocabulary
from minidrag.tiny.scenes import caption, random_scene, render
from minidrag.weights.model import Model, load_model

VAE_CONFIG = VAEConfig(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=16)
UNET_CONFIG = UNetConfig(
    block_out_channels=(64, 96, 160, 192),
    heads=(1, 2, 4, 4),  # few on the fine levels: attention over 32 x 32 positions is half the work there
    layers_per_block=1,
    cross_attention_dim=128,
    norm_num_groups=16,
)
TEXT_CONFIG = CLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)


@dataclass(frozen=True)
class TrainConfig:
    """How the small model is trained; all of it is written beside the weights."""

    seed: int = 0
    vae_steps: int = 5000
    vae_batch: int = 4
    vae_rate: float = 1e-3
    kl_weight: float = 5e-4  # of the KL's mean per latent element, against a mean error per pixel
    scenes: int = 12000  # pictures encoded once for the UNet, which sees each of them several times
    vocab_size: int = 700
    steps: int = 6000
    batch: int = 16
    rate: float = 1e-3
    empty_captions: float = 0.1  # share, so that classifier-free guidance works (arXiv 2207.12598)
    ema: float = 0.999
    save_every: int = 250
    device: str = "cpu"


class Trainer:
    """Steps of AdamW with warm-up, cool-down, running averages and a checkpoint to resume from."""

    def __init__(self, networks: nn.ModuleDict, rate: float, steps: int, config: TrainConfig, path: Path):
        self.networks = networks.to(config.device)
        for weight in networks.parameters():
            if weight.dim() == 4:  # convolutions; Module.to does the same, but older torch has no type for it
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.networks).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            networks.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.rate, self.steps, self.config, self.path, self.done = rate, steps, config, path, 0
        if path.exists():
            self.resume()

    def resume(self) -> None:
        try:
            state = torch.load(self.path, map_location=self.config.device, weights_only=True)
            self.networks.load_state_dict(state["networks"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.done = state["done"]
        except Exception as error:  # torch raises many kinds for a broken file
            raise unusable(self.path, error) from error

    def save(self) -> None:
        state = {"networks": self.networks.state_dict(), "average": self.average.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "done": self.done}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def run(self, loss_of: Callable[[int], Tensor], name: str) -> None:
        """Trains to the last step and leaves the averages in the networks.

        loss_of: step -> the loss of that step's batch, a function of the step's number alone.
        """
        bar = tqdm(
            range(self.done, self.steps), initial=self.done, total=self.steps, desc=name, mininterval=10
        )
        smooth = None
        for step in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * min((step + 1) / 100, 1.0, (self.steps - step) / (0.3 * self.steps))
            with autocast(self.config):
                loss = loss_of(step)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
            self.optimizer.step()
            self.follow(min(self.config.ema, (step + 1) / (step + 10)))
            self.done = step + 1
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.5f}", refresh=False)
            if self.done % self.config.save_every == 0 or self.done == self.steps:
                self.save()
        self.networks.load_state_dict(self.average.state_dict())
        self.networks.requires_grad_(False)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Moves the running averages a little towards the weights."""
        for average, weight in zip(self.average.parameters(), self.networks.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)


def unusable(path: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path} cannot be resumed from, delete it to have it made anew: {reason}")


def autocast(config: TrainConfig) -> AbstractContextManager:
    return torch.autocast(config.device.split(":")[0], torch.bfloat16)


def generator(config: TrainConfig, stage: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed * 10**9 + stage * 10**8 + step)


def scenes(config: TrainConfig, start: int, count: int) -> Iterator:
    """Scenes number start, start + 1, ... of the seed. `check` takes its own from numbers below zero."""
    return (random_scene(random.Random(f"{config.seed} {start + i}")) for i in range(count))


def pictures(config: TrainConfig, start: int, count: int) -> Tensor:
    """Their pictures, (count, 3, 128, 128) in -1..1."""
    rows = np.stack([np.asarray(render(scene)) for scene in scenes(config, start, count)])
    batch = torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, H, W, C) -> (B, C, H, W)
    return batch.to(config.device).contiguous(memory_format=torch.channels_last)


def train_vae(config: TrainConfig, work: Path) -> VAE:
    """Trains the autoencoder, on new pictures at every step; returns its running average."""
    torch.manual_seed(config.seed)
    vae, scale = VAE(VAE_CONFIG), VAE_CONFIG.scaling_factor
    trainer = Trainer(nn.ModuleDict({"vae": vae}), config.vae_rate, config.vae_steps, config, work / "vae.pt")

    def loss_of(step: int) -> Tensor:
        batch = pictures(config, step * config.vae_batch, config.vae_batch)
        mean, deviation = (x.float() / scale for x in vae.encode(batch))
        noise = torch.randn(mean.shape, generator=generator(config, 1, step)).to(batch)
        error = vae.decode((mean + deviation * noise) * scale).float() - batch
        divergence = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).mean()
        return error.abs().mean() + error.square().mean() + config.kl_weight * divergence

    trainer.run(loss_of, "autoencoder")
    normalise(vae, encode(vae, config, 0, 256)[0])
    return vae


@torch.no_grad()
def normalise(vae: VAE, means: Tensor) -> None:
    """Gives every latent channel mean 0 and, scaled, deviation 1, and leaves the round trip as it is.

    Both are affine maps per channel, so they fold into the 1x1 convolutions at the ends of the latent.
    means: (N, 4, H, W), scaled latents, on any device.
    """
    scale, means = vae.config.scaling_factor, means.to(vae.quant_conv.weight)
    shift, spread = means.mean((0, 2, 3)) / scale, means.std((0, 2, 3))
    entry, leave, count = vae.quant_conv, vae.post_quant_conv, len(shift)
    assert entry.bias is not None and leave.bias is not None
    leave.bias += (leave.weight[:, :, 0, 0] @ shift[:, None])[:, 0]
    leave.weight *= spread[None, :, None, None]
    entry.bias[:count] = (entry.bias[:count] - shift) / spread
    entry.bias[count:] -= 2 * spread.log()  # the other half is the logarithm of the variance
    entry.weight[:count] /= spread[:, None, None, None]


@torch.no_grad()
def encode(vae: VAE, config: TrainConfig, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Means and deviations of the scaled latents of `count` pictures, each (count, 4, 32, 32), on the CPU."""
    chunks = []
    for i in tqdm(range(0, count, 16), desc="encoding", mininterval=10, disable=count < 1000):
        with autocast(config):
            mean, deviation = vae.encode(pictures(config, start + i, min(16, count - i)))
        chunks.append((mean.float().cpu(), deviation.float().cpu()))
    return torch.cat([mean for mean, _ in chunks]), torch.cat([deviation for _, deviation in chunks])


def train_unet(
    config: TrainConfig, work: Path, vae: VAE, start: Model | None
) -> tuple[UNet, CLIPTextEncoder]:
    """Trains UNet and text encoder to predict the noise in the latents of captioned scenes (DDPM eq. 14).

    L = w(t) || eps - eps_theta(z_t, t, text) ||_2^2,   w(t) ~ SNR(t)^(-1/2),   t = 1000 sqrt(u), u in 0..1

    The weights, of mean 1, are those of arXiv 2310.08442: without them hardly anything of the loss comes from
    the noisiest steps, which decide how many things there are and where. For the same reason timesteps are
    drawn the more often the later they are. A batch's u are spread evenly from a random start, which has less
    variance than drawing each (arXiv 2107.00630, appendix I.1).
    """
    torch.manual_seed(config.seed + 1)
    captions = [caption(scene) for scene in scenes(config, 0, config.scenes)]
    if start is None:
        tokenizer = vocabulary.train(captions, config.vocab_size, work / "tokenizer")
        text_config = replace(TEXT_CONFIG, vocab_size=tokenizer.eos + 1)
        unet, text_encoder = UNet(UNET_CONFIG), CLIPTextEncoder(text_config)
    else:
        shutil.copytree(Path(start.source) / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
        tokenizer, unet, text_encoder = start.tokenizer, start.unet, start.text_encoder
    networks = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).requires_grad_(True)
    trainer = Trainer(networks, config.rate, config.steps, config, work / "unet.pt")
    if trainer.done < config.steps:
        means, deviations = latents(vae, config, work)
    tokens, empty, schedule = tokenizer(captions), tokenizer(""), Schedule()
    weights = (1 / schedule.alphas_cumprod - 1).sqrt()
    weights /= weights.mean()

    def loss_of(step: int) -> Tensor:
        draw = generator(config, 2, step)
        chosen = torch.randint(len(means), (config.batch,), generator=draw)
        dropped = torch.rand(config.batch, 1, generator=draw) < config.empty_captions
        spread = (torch.rand(1, generator=draw) + torch.arange(config.batch)) / config.batch
        timestep = (1000 * spread.sqrt()).long().clamp(max=999)
        inner, noise = (torch.randn(config.batch, *means.shape[1:], generator=draw) for _ in range(2))
        clean = means[chosen].float() + deviations[chosen].float() * inner
        noisy = schedule.add_noise(clean, noise, timestep).to(config.device)
        text = text_encoder(torch.where(dropped, empty, tokens[chosen]).to(config.device))
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, timestep.to(config.device), text)[0]
        error = (predicted.float() - noise.to(config.device)).square().mean((1, 2, 3))
        return (weights[timestep].to(config.device) * error).mean()

    trainer.run(loss_of, "UNet")
    return unet, text_encoder


def latents(vae: VAE, config: TrainConfig, work: Path) -> tuple[Tensor, Tensor]:
    """The latents that the UNet is trained on, in half precision; kept in a file, for a run that resumes."""
    path = work / "latents.pt"
    if not path.exists():
        pair = tuple(part.half() for part in encode(vae, config, 0, config.scenes))
        torch.save(pair, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # as in Trainer.resume
        raise unusable(path, error) from error


def claim(work: Path, wanted: dict) -> None:
    """Notes the settings of the run in `work`; raises ValueError where it is one of others."""
    settings = work / "config.json"
    try:
        if settings.exists() and json.loads(settings.read_text()) != wanted:
            raise ValueError(f"{work} holds a run with other settings: give another --work, or delete it")
    except json.JSONDecodeError as error:
        message = f"{settings} is broken, delete it if it is of a run with these settings: {error}"
        raise ValueError(message) from error
    settings.write_text(json.dumps(wanted, indent=1) + "\n")


def train(config: TrainConfig, out: Path, work: Path, start: str | None = None) -> None:
    """Trains all of it, checkpoints in `work`, and writes the model's folder to `out`, whole or not.

    start: folder of a model to train on; its autoencoder is kept.
    """
    folder.must_be_free(out)
    began, model = time.time(), None if start is None else load_model(start, dtype=torch.float32)
    work.mkdir(parents=True, exist_ok=True)
    wanted = {**asdict(config), "start": start}
    del wanted["steps"], wanted["device"]  # a run may end sooner or later, and go on elsewhere
    claim(work, wanted)
    vae = train_vae(config, work) if model is None else model.vae.to(config.device)
    unet, text_encoder = train_unet(config, work, vae, model)
    made = {
        "command": f"python -m {__spec__.name}",
        **wanted,
        "steps": config.steps,
        "device": config.device,
        "hours": (time.time() - began) / 3600,
    }
    folder.write(out, unet, vae, text_encoder, work / "tokenizer", made)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minidrag.tiny.train", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path, help="folder that the model is written to")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny"), help="checkpoints (default: %(default)s)"
    )
    parser.add_argument("--start", metavar="FOLDER", help="a model of this kind to train on")
    for name, value in asdict(TrainConfig()).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help="default: %(default)s")
    given = vars(parser.parse_args())
    out, work, start = given.pop("out"), given.pop("work"), given.pop("start")
    try:
        train(TrainConfig(**given), out, work, start)
    except (ValueError, OSError) as error:
        print(f"minidrag: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"minidrag: stopped; the same command goes on from the checkpoint in {work}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
