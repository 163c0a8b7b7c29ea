"""The loop against that of version 0.1, bit for bit, on random small drags."""

import random

import torch
from support import drag_0_1

from minidrag.config import EditConfig
from minidrag.method.ddim import Schedule
from minidrag.method.drag import Cell
from minidrag.method.dragdiffusion import Task, dragdiffusion
from minidrag.networks.unet import UNet, UNetConfig


def test_the_new_loop_equals_the_old_one() -> None:
    torch.manual_seed(0)
    sizes = UNetConfig(
        block_out_channels=(8, 8, 12, 12),
        heads=(2,) * 4,
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    unet, schedule, text = UNet(sizes).requires_grad_(False), Schedule(), torch.randn(1, 77, 8)
    for number in range(150):
        draw = random.Random(number)
        height, width = draw.randint(5, 10), draw.randint(5, 10)
        rows, columns = 2 * height, 2 * width
        latent = torch.randn(1, 4, height, width)
        count = draw.randint(1, 3)
        handles = [(float(draw.randrange(rows)), float(draw.randrange(columns))) for _ in range(count)]
        targets = [(draw.uniform(-2, rows + 1), draw.uniform(-2, columns + 1)) for _ in range(count)]
        mask = None if draw.random() < 0.3 else (torch.rand(height, width) > 0.4).float()
        config = EditConfig(
            drag_steps=draw.randint(0, 5),
            drag_lr=draw.choice([0.01, 0.05]),
            motion_radius=draw.randint(0, 2),
            motion_step=draw.choice([1.0, 2.0, 0.7]),
            motion_reference=draw.choice(["moving", "start"]),
            motion_loss=draw.choice(["sum", "mean"]),
            track_radius=draw.randint(0, 4),
            tolerance=draw.choice([0.0, 1.0, 2.0, 5.0]),
            block=draw.randint(1, 4),
        )
        old = drag_0_1.optimise(unet, schedule, latent, text, handles, targets, mask, (rows, columns), config)
        cells = ([Cell(*point) for point in points] for points in (handles, targets))
        task = Task(*cells, mask, (rows, columns))
        path = [latent] * (config.inversion_steps + 1)
        steps = list(dragdiffusion(unet, schedule, path, text, task, config))
        assert torch.equal(steps[-1].latent, old.latent)
        assert [step.loss for step in steps[1:]] == old.losses
        assert [list(path) for path in zip(*[step.handles for step in steps], strict=True)] == old.paths
        assert all(torch.equal(step.predicted, z) for step, z in zip(steps, old.clean, strict=True))
