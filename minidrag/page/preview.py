"""Cheap previews of a latent during a drag."""

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad, unfold

from minidrag import images

RIDGE = 0.3  # of the variance: latents in the middle of a drag are noisier than those of the fit


class LatentPreview:
    """A linear map from latents to colors, fitted to one image.

    A preview is the image plus the map of the latent's difference from the first one.
    """

    def __init__(self, latent: Tensor, image: Image.Image, size: tuple[int, int]):
        """latent: of the image, (1, 4, H, W). size: (width, height) of a preview."""
        height, width = latent.shape[2:]
        colors = images.to_tensor(images.resize(image, (width, height))).flatten(2)[0].T  # (H W, 3)
        self.map = fit(neighborhoods(latent), colors)
        self.image = images.to_tensor(images.resize(image, size))
        self.first: Tensor | None = None

    def preview(self, latent: Tensor) -> Image.Image:
        """Preview of a latent (1, 4, H, W)."""
        if self.first is None:
            self.first = latent
        cells = neighborhoods(latent - self.first) @ self.map
        change = cells.T.unflatten(1, latent.shape[2:])[None]  # (1, 3, H, W)
        return images.to_image(self.image + interpolate(change, self.image.shape[2:], mode="bicubic"))


def fit(cells: Tensor, colors: Tensor) -> Tensor:
    """Ridge regression from cells (N, 36) to colors (N, 3), both centered: (36, 3)."""
    centered = cells - cells.mean(0)
    ridge = torch.diag(RIDGE * len(cells) * (cells.var(0) + 1e-6))
    return torch.linalg.solve(centered.T @ centered + ridge, centered.T @ (colors - colors.mean(0)))


def neighborhoods(latent: Tensor) -> Tensor:
    """Cells of a latent (1, 4, H, W), each with its eight neighbors: (H W, 36), float32, on the CPU."""
    return unfold(pad(latent.float().cpu(), (1, 1, 1, 1), mode="replicate"), 3)[0].T
