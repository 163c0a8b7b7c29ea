"""Cheap previews of a latent during a drag."""

import time

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad, unfold

from minidrag import images
from minidrag.config import EditConfig
from minidrag.model import Model, decode, working_size

SHARE = 0.02  # of an edit's time that its previews may take
RIDGE = 0.3  # of the variance: latents in the middle of a drag are noisier than those of the fit


class LatentPreview:
    """A linear map from latents to colors, fitted to one image; a decode where there is time for it.

    A preview is the image plus the map of the latent's difference from the first one. The map is fitted at
    half the working size, where encoding takes a quarter of the time.
    """

    def __init__(self, model: Model, image: Image.Image, config: EditConfig):
        start = time.perf_counter()
        cell = model.vae.config.factor
        size = working_size(model, image.size, config)
        width, height = (max(8, side // (2 * cell)) for side in size)
        pixels = images.to_tensor(images.resize(image, (width * cell, height * cell)))
        with torch.no_grad():
            mean, _ = model.vae.encode(pixels.to(model.device, model.dtype))
        colors = images.to_tensor(images.resize(image, (width, height))).flatten(2)[0].T  # (H W, 3)
        self.model = model
        self.map = fit(neighborhoods(mean), colors)
        self.image = images.to_tensor(images.resize(image, size))
        self.first: Tensor | None = None
        self.spent = time.perf_counter() - start
        # Decoding takes about twice the time of encoding, here of a quarter of the cells.
        self.decoding = 8 * self.spent

    def preview(self, latent: Tensor, elapsed: float) -> Image.Image:
        """Preview of a latent (1, 4, H, W). elapsed: seconds of the edit so far."""
        start = time.perf_counter()
        if self.first is None:
            self.first = latent
        # On a GPU the decoder is set aside during the drag.
        if latent.device.type != "cpu" or self.spent + self.decoding > SHARE * elapsed:
            cells = neighborhoods(latent - self.first) @ self.map
            change = cells.T.unflatten(1, latent.shape[2:])[None]  # (1, 3, H, W)
            preview = images.to_image(self.image + interpolate(change, self.image.shape[2:], mode="bicubic"))
        else:
            preview = decode(self.model, latent)
            self.decoding = time.perf_counter() - start
        self.spent += time.perf_counter() - start
        return preview


def fit(cells: Tensor, colors: Tensor) -> Tensor:
    """Ridge regression from cells (N, 36) to colors (N, 3), both centered: (36, 3)."""
    centered = cells - cells.mean(0)
    ridge = torch.diag(RIDGE * len(cells) * (cells.var(0) + 1e-6))
    return torch.linalg.solve(centered.T @ centered + ridge, centered.T @ (colors - colors.mean(0)))


def neighborhoods(latent: Tensor) -> Tensor:
    """Cells of a latent (1, 4, H, W), each with its eight neighbors: (H W, 36), float32, on the CPU."""
    return unfold(pad(latent.float().cpu(), (1, 1, 1, 1), mode="replicate"), 3)[0].T
