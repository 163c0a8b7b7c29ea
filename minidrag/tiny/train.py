"""Train the small model that ships, a latent diffusion model of rendered scenes, from scratch.

    python -m minidrag.tiny.train OUT        # see --help for the options

Trains the autoencoder, then the UNet together with the text encoder. Every random draw depends only on the
seed and the step number, so a resumed run gives the same weights as an uninterrupted one. --start FOLDER
keeps the autoencoder and vocabulary of an existing model and fine-tunes its UNet and text encoder.
"""

import copy
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from minidrag.config import check_bounds
from minidrag.images import to_tensor
from minidrag.method.ddim import Schedule
from minidrag.model import Model
from minidrag.networks.clip import CLIPConfig, CLIPTextEncoder
from minidrag.networks.tokenizer import Tokenizer
from minidrag.networks.unet import UNet, UNetConfig
from minidrag.networks.vae import VAE, VAEConfig
from minidrag.system import console
from minidrag.system.files import check_regular, reserve, write_whole
from minidrag.tiny import folder, vocabulary
from minidrag.tiny.scenes import caption, random_scene, render
from minidrag.weights.device import check_device
from minidrag.weights.load import load_model

VAE_CONFIG = VAEConfig(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=16)
UNET_CONFIG = UNetConfig(
    block_out_channels=(64, 96, 160, 192),
    heads=(1, 2, 4, 4),  # few at high resolution, where attention over 32x32 positions is half the cost
    layers_per_block=1,
    cross_attention_dim=128,
    norm_num_groups=16,
)
TEXT_CONFIG = CLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)


MAX_STEPS = 10**8 - 1  # more would use another stage's random numbers, see `generator`
BOUNDS = {  # least and most
    "seed": (0, 9 * 10**9),
    **dict.fromkeys(("vae_steps", "steps"), (0, MAX_STEPS)),
    **dict.fromkeys(("vae_batch", "batch", "scenes", "save_every"), (1, 1_000_000)),
    **dict.fromkeys(("vae_rate", "rate", "kl_weight"), (0, 1000)),
    "vocab_size": (514, 49_408),  # bytes and special tokens alone, to CLIP's
    **dict.fromkeys(("empty_captions", "ema"), (0, 1)),
}


@dataclass(frozen=True)
class TrainConfig:
    """Training settings, saved in training.json beside the weights."""

    seed: int = 0
    vae_steps: int = 5000
    vae_batch: int = 4
    vae_rate: float = 1e-3  # learning rate of the autoencoder
    kl_weight: float = 5e-4  # of the KL divergence per latent element; the error is per pixel
    scenes: int = 12000  # training images of the UNet, encoded once
    vocab_size: int = 700
    steps: int = 6000
    batch: int = 16
    rate: float = 1e-3  # learning rate of UNet and text encoder
    empty_captions: float = 0.1  # dropout probability for classifier-free guidance (arXiv 2207.12598)
    ema: float = 0.999
    save_every: int = 250
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)


class Trainer:
    """AdamW training loop with learning rate warmup and decay, EMA weights and a checkpoint."""

    def __init__(self, networks: nn.ModuleDict, rate: float, steps: int, config: TrainConfig, path: Path):
        self.networks = networks.to(config.device)
        for weight in networks.parameters():
            if weight.dim() == 4:  # convolutions; older torch has no type for Module.to(memory_format=...)
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.networks).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            networks.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.rate = rate
        self.steps = steps
        self.config = config
        self.path = path
        self.done = 0
        if path.exists():
            self.resume()

    def resume(self) -> None:
        with resuming(self.path):
            state = torch.load(self.path, map_location=self.config.device, weights_only=True)
            self.networks.load_state_dict(state["networks"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.done = int(state["done"])

    def save(self) -> None:
        state = {"networks": self.networks.state_dict(), "average": self.average.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "done": self.done}
        save(state, self.path)

    def run(self, loss_of: Callable[[int], Tensor], name: str) -> None:
        """Train to the last step, then load the EMA weights into the networks.

        loss_of: step -> loss of the batch of that step. Must depend on the step number alone.
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
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of the {name} became {loss.item()}: try a smaller rate")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
            self.optimizer.step()
            self.update_average(min(self.config.ema, (step + 1) / (step + 10)))
            self.done = step + 1
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.5f}", refresh=False)
            if self.done % self.config.save_every == 0 or self.done == self.steps:
                self.save()
        self.networks.load_state_dict(self.average.state_dict())
        self.networks.requires_grad_(False)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        for average, weight in zip(self.average.parameters(), self.networks.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)


def save(values: object, path: Path) -> None:
    """Write a checkpoint, all of it or nothing. Raises OSError for a full disk, as PyTorch does not."""
    try:
        write_whole(path, lambda part: torch.save(values, part))
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written, perhaps as the disk is full: free some space") from error


@contextmanager
def resuming(path: Path) -> Iterator[None]:
    """Raise ValueError, with the remedy, for a checkpoint that cannot be read within a context."""
    check_regular(path)
    try:
        yield
    except Exception as error:  # torch.load raises many exception types for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot resume from {path}, delete it to create it again: {reason}") from error


def autocast(config: TrainConfig) -> AbstractContextManager:
    return torch.autocast(config.device.split(":")[0], torch.bfloat16)


def generator(config: TrainConfig, stage: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed * 10**9 + stage * 10**8 + step)


def scenes(config: TrainConfig, start: int, count: int) -> Iterator:
    """Scenes start, start + 1, ... of this seed. Negative numbers are held out for evaluation."""
    return (random_scene(random.Random(f"{config.seed} {start + i}")) for i in range(count))


def render_batch(config: TrainConfig, start: int, count: int) -> Tensor:
    """Render the same scenes: (count, 3, 128, 128), -1 to 1."""
    batch = torch.cat([to_tensor(render(scene)) for scene in scenes(config, start, count)])
    return batch.to(config.device).contiguous(memory_format=torch.channels_last)


def train_vae(config: TrainConfig, work: Path) -> VAE:
    """Train the autoencoder, on new images at every step, and return it with EMA weights."""
    torch.manual_seed(config.seed)
    vae = VAE(VAE_CONFIG)
    scale = VAE_CONFIG.scaling_factor
    trainer = Trainer(nn.ModuleDict({"vae": vae}), config.vae_rate, config.vae_steps, config, work / "vae.pt")

    def loss_of(step: int) -> Tensor:
        batch = render_batch(config, step * config.vae_batch, config.vae_batch)
        mean, std = (x.float() / scale for x in vae.encode(batch))
        noise = torch.randn(mean.shape, generator=generator(config, 1, step)).to(batch)
        error = vae.decode((mean + std * noise) * scale).float() - batch
        divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return error.abs().mean() + error.square().mean() + config.kl_weight * divergence

    trainer.run(loss_of, "autoencoder")
    normalize_latents(vae, encode(vae, config, 0, 256)[0])
    return vae


@torch.no_grad()
def normalize_latents(vae: VAE, means: Tensor) -> None:
    """Give every scaled latent channel mean 0 and std 1 without changing the reconstruction.

    Both are affine per channel, so they fold into the 1x1 convolutions before and after the latent.
    means: (N, 4, H, W), scaled latents, on any device.
    """
    means = means.to(vae.quant_conv.weight)
    shift = means.mean((0, 2, 3)) / vae.config.scaling_factor
    std = means.std((0, 2, 3))
    before = vae.quant_conv
    after = vae.post_quant_conv
    channels = len(shift)
    assert before.bias is not None and after.bias is not None
    after.bias += (after.weight[:, :, 0, 0] @ shift[:, None])[:, 0]
    after.weight *= std[None, :, None, None]
    before.bias[:channels] = (before.bias[:channels] - shift) / std
    before.bias[channels:] -= 2 * std.log()  # the second half of the channels is the log variance
    before.weight[:channels] /= std[:, None, None, None]


@torch.no_grad()
def encode(vae: VAE, config: TrainConfig, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Mean and std of the scaled latents of `count` scenes, each (count, 4, 32, 32), on the CPU."""
    chunks = []
    for i in tqdm(range(0, count, 16), desc="encoding", mininterval=10, disable=count < 1000):
        with autocast(config):
            mean, std = vae.encode(render_batch(config, start + i, min(16, count - i)))
        chunks.append((mean.float().cpu(), std.float().cpu()))
    return torch.cat([mean for mean, _ in chunks]), torch.cat([std for _, std in chunks])


def train_unet(
    config: TrainConfig, work: Path, vae: VAE, start: Model | None
) -> tuple[UNet, CLIPTextEncoder]:
    """Train UNet and text encoder to predict the noise in latents of captioned scenes (DDPM eq. 14).

    L = w(t) || eps - eps_theta(z_t, t, text) ||_2^2
    """
    torch.manual_seed(config.seed + 1)
    captions = [caption(scene) for scene in scenes(config, 0, config.scenes)]
    tokenizer, unet, text_encoder = initial_networks(config, work, captions, start)
    networks = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).requires_grad_(True)
    trainer = Trainer(networks, config.rate, config.steps, config, work / "unet.pt")
    if trainer.done < config.steps:
        means, stds = cached_latents(vae, config, work)
    tokens = tokenizer(captions)
    empty = tokenizer("")
    schedule = Schedule()
    weights = loss_weights(schedule)

    def loss_of(step: int) -> Tensor:
        rng = generator(config, 2, step)
        chosen = torch.randint(len(means), (config.batch,), generator=rng)
        dropped = torch.rand(config.batch, 1, generator=rng) < config.empty_captions
        timestep = sample_timesteps(config.batch, rng)
        posterior, noise = (torch.randn(config.batch, *means.shape[1:], generator=rng) for _ in range(2))
        clean = means[chosen].float() + stds[chosen].float() * posterior
        noisy = schedule.add_noise(clean, noise, timestep).to(config.device)
        text = text_encoder(torch.where(dropped, empty, tokens[chosen]).to(config.device))
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, timestep.to(config.device), text)[0]
        error = (predicted.float() - noise.to(config.device)).square().mean((1, 2, 3))
        return (weights[timestep].to(config.device) * error).mean()

    trainer.run(loss_of, "UNet")
    return unet, text_encoder


def initial_networks(
    config: TrainConfig, work: Path, captions: list[str], start: Model | None
) -> tuple[Tokenizer, UNet, CLIPTextEncoder]:
    """New networks with a vocabulary trained on the captions, or those of `start`."""
    if start is None:
        tokenizer = vocabulary.train(captions, config.vocab_size, work / "tokenizer")
        text_config = replace(TEXT_CONFIG, vocab_size=tokenizer.eos + 1)
        return tokenizer, UNet(UNET_CONFIG), CLIPTextEncoder(text_config)
    shutil.copytree(Path(start.source) / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    return start.tokenizer, start.unet, start.text_encoder


def loss_weights(schedule: Schedule) -> Tensor:
    """Weight of each timestep in the loss: w(t) ~ SNR(t)^(-1/2), with mean 1 (arXiv 2310.08442), (1000,).

    Unweighted, the noisiest steps barely count, and they decide the number and position of objects.
    """
    weights = (1 / schedule.alphas_cumprod - 1).sqrt()
    return weights / weights.mean()


def sample_timesteps(batch: int, rng: torch.Generator) -> Tensor:
    """Timesteps t = 1000 sqrt(u), which favors the noisiest ones: (batch,).

    u is evenly spaced in 0 to 1 with a random offset, for less variance (arXiv 2107.00630, appendix I.1).
    """
    u = (torch.rand(1, generator=rng) + torch.arange(batch)) / batch
    return (1000 * u.sqrt()).long().clamp(max=999)


def cached_latents(vae: VAE, config: TrainConfig, work: Path) -> tuple[Tensor, Tensor]:
    """Mean and std of the latents that the UNet is trained on, in half precision, cached in a file."""
    path = work / "latents.pt"
    if not path.exists():
        pair = tuple(part.half() for part in encode(vae, config, 0, config.scenes))
        save(pair, path)
    with resuming(path):
        return torch.load(path, weights_only=True)


def train(config: TrainConfig, out: Path, work: Path, start: str | None = None) -> None:
    """Train a model with checkpoints in `work` and write its folder to `out` once it is complete.

    start: folder of a model to fine-tune. Its autoencoder is kept.
    """
    folder.must_be_free(out)
    if out.resolve() in (work.resolve(), *work.resolve().parents):
        raise ValueError(f"the checkpoints in {work} would be part of the model {out}: give another folder")
    began = time.time()
    model = None if start is None else load_model(start, dtype=torch.float32)
    settings = {**asdict(config), "start": start}
    del settings["steps"], settings["device"]  # a resumed run may change these
    reserve(work, json.dumps(settings, indent=1), "--work")
    vae = train_vae(config, work) if model is None else model.vae.to(config.device)
    unet, text_encoder = train_unet(config, work, vae, model)
    record = {
        "command": f"python -m {__spec__.name}",
        **settings,
        "steps": config.steps,
        "device": config.device,
        "hours": (time.time() - began) / 3600,
    }
    folder.write(out, unet, vae, text_encoder, work / "tokenizer", record)


def main() -> int:
    parser = console.Parser(prog="python -m minidrag.tiny.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny"), help="folder for checkpoints (default: %(default)s)"
    )
    parser.add_argument("--start", metavar="FOLDER", help="model to fine-tune")
    defaults = asdict(TrainConfig())
    for name, value in defaults.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(value), default=value, help="default: %(default)s")

    def job() -> None:
        args = parser.parse_args()
        settings = {name: getattr(args, name) for name in defaults}
        check_device(args.device)
        try:
            train(TrainConfig(**settings), args.out, args.work, args.start)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"run the same command to resume from {args.work}") from None

    return console.command(job, "try a smaller --batch or --vae-batch")


if __name__ == "__main__":
    sys.exit(main())
