"""Pictures of a latent that cost next to nothing, to watch a drag by."""

import time

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad, unfold

from minidrag import images
from minidrag.config import EditConfig
from minidrag.model import Model, decode, working_size

SHARE = 0.02  # of an edit's time that its pictures may take
RIDGE = 0.3  # of the variance: latents in the middle of a drag are noisier than those of the fit


class Foresight:
    """A linear map from latents to colors, fitted to one picture; a decode where there is time for it.

    The map shows what changes: the picture plus the map of the latent's difference from the first one. It is
    fitted at half the working size, where encoding takes a quarter of the time.
    """

    def __init__(self, model: Model, image: Image.Image, config: EditConfig):
        cell, start = model.vae.config.factor, time.perf_counter()
        size = working_size(model, image.size, config)
        width, height = (max(8, side // (2 * cell)) for side in size)
        pixels = images.to_tensor(images.resize(image, (width * cell, height * cell)))
        with torch.no_grad():
            mean, _ = model.vae.encode(pixels.to(model.device, model.dtype))
        known = columns(mean)
        wanted = images.to_tensor(images.resize(image, (width, height))).flatten(2)[0].T  # (H W, 3)
        centered, colors = known - known.mean(0), wanted - wanted.mean(0)
        ridge = torch.diag(RIDGE * len(known) * (known.var(0) + 1e-6))
        self.map = torch.linalg.solve(centered.T @ centered + ridge, centered.T @ colors)  # (36, 3)
        self.model, self.picture = model, images.to_tensor(images.resize(image, size))
        self.first: Tensor | None = None
        self.spent = time.perf_counter() - start
        # Decoding takes about twice the time of encoding, here of a quarter of the cells.
        self.decoding = 8 * self.spent

    def look(self, latent: Tensor, elapsed: float) -> Image.Image:
        """Picture of a latent (1, 4, H, W). elapsed: seconds of the edit so far."""
        start, self.first = time.perf_counter(), latent if self.first is None else self.first
        # On a GPU the decoder is set aside during the drag.
        if latent.device.type != "cpu" or self.spent + self.decoding > SHARE * elapsed:
            change = (columns(latent - self.first) @ self.map).T.unflatten(1, latent.shape[2:])  # (3, H, W)
            shape = self.picture.shape[2:]
            picture = images.to_image(self.picture + interpolate(change[None], shape, mode="bicubic"))
        else:
            picture = decode(self.model, latent)
            self.decoding = time.perf_counter() - start
        self.spent += time.perf_counter() - start
        return picture


def columns(latent: Tensor) -> Tensor:
    """Cells of a latent (1, 4, H, W), each with its eight neighbors: (H W, 36), float32, on the CPU."""
    return unfold(pad(latent.float().cpu(), (1, 1, 1, 1), mode="replicate"), 3)[0].T
