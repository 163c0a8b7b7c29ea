"""Pictures of a latent that cost next to nothing, to watch a drag by."""

import time

import torch
from PIL import Image, ImageChops
from torch import Tensor

from minidrag import images, tiny
from minidrag.weights.model import Model, decode

SHARE = 0.02  # of an edit's time that its pictures may take
SIDE = 16  # of the latents that the map is fitted to


class Foresight:
    """A linear map from a latent to colors, fitted once per model; a decode where there is time for it."""

    def __init__(self, model: Model):
        side = SIDE * model.vae.config.factor
        picture = images.resize(Image.open(tiny.DEMO / "picture.png").convert("RGB"), (side, side))
        red, green, blue = picture.split()
        colors = [picture, ImageChops.invert(picture), Image.merge("RGB", (blue, red, green))]
        pixels = torch.cat([images.to_tensor(image) for image in colors])
        with torch.no_grad():
            mean, _ = model.vae.encode(pixels.to(model.device, model.dtype))
            start = time.perf_counter()
            decode(model, mean[:1])
        self.model, self.spent, self.second_per_cell = model, 0.0, (time.perf_counter() - start) / SIDE**2
        small = torch.nn.functional.interpolate(pixels, size=mean.shape[2:], mode="area")
        self.map = torch.linalg.lstsq(columns(mean), small.movedim(1, 3).flatten(0, 2)).solution  # (5, 3)

    def look(self, latent: Tensor, elapsed: float) -> Image.Image:
        """Picture of a latent (1, 4, H, W). elapsed: seconds of the edit so far."""
        cost = self.second_per_cell * latent[0, 0].numel()
        # On a GPU the decoder is set aside during the drag.
        if latent.device.type != "cpu" or self.spent + cost > SHARE * elapsed:
            return self.guess(latent)
        self.spent += cost
        return decode(self.model, latent)

    def guess(self, latent: Tensor) -> Image.Image:
        pixels = (columns(latent) @ self.map).unflatten(0, latent.shape[2:])  # (H W, 3) -> (H, W, 3)
        return images.to_image(pixels.movedim(2, 0)[None])


def columns(latent: Tensor) -> Tensor:
    """Cells of latents (B, 4, H, W) and a one for the constant: (B H W, 5), float32 on the CPU."""
    cells = latent.float().cpu().movedim(1, 3).flatten(0, 2)
    return torch.cat([cells, cells.new_ones(len(cells), 1)], dim=1)
