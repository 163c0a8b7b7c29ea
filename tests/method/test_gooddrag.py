"""Dragging and denoising in turn: one level is DragDiffusion, each level has the original's."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method import gooddrag as module
from minidrag.method.ddim import Denoiser, Schedule, invert
from minidrag.method.drag import Cell, Cells, Origin, Step, drag
from minidrag.method.dragdiffusion import Task, dragdiffusion, observer
from minidrag.method.gooddrag import PATIENCE, gooddrag
from minidrag.method.warp import warp
from minidrag.networks.unet import UNet, UNetConfig

SCHEDULE, GRID = Schedule(), (16, 16)
CONFIG = EditConfig(inversion_steps=9, drag_steps=2, drag_levels=3, drag_lr=0.05, warp_start=False).scaled(
    GRID
)
TASK = Task([Cell(4, 5), Cell(10, 9)], [Cell(4, 11.4), Cell(13, 9)], torch.ones(8, 8), GRID)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    sizes = UNetConfig(
        block_out_channels=(16, 16, 24, 24),
        heads=(1, 2, 2, 2),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    return UNet(sizes).requires_grad_(False)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def path(unet: UNet, text: Tensor) -> list[Tensor]:
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return [clean, *invert(denoiser_of(unet, text), clean, CONFIG.levels)]


def denoiser_of(unet: UNet, text: Tensor) -> Denoiser:
    return Denoiser(unet, SCHEDULE, text, CONFIG.steps)


def same(one: Step, other: Step) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, torch.as_tensor(b)) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("reference", ["start", "moving"])
@pytest.mark.parametrize("masked", [True, False])
def test_one_level_is_dragdiffusion_bit_for_bit(
    unet: UNet, text: Tensor, path: list[Tensor], reference: str, masked: bool
) -> None:
    config = replace(CONFIG, drag_levels=1, drag_steps=4, motion_reference=reference)
    task = TASK if masked else TASK._replace(mask=None)
    found = list(gooddrag(denoiser_of(unet, text), path, task, config))
    expected = list(dragdiffusion(denoiser_of(unet, text), path, task, config))
    assert len(found) == len(expected) == 5
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_every_level_is_compared_with_the_original_at_that_level(
    unet: UNet, text: Tensor, path: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Tensor, Cells, Origin]] = []

    def recorded(latent: Tensor, handles: Cells, *rest):
        told.append((latent, handles, rest[-1]))
        return drag(latent, handles, *rest)

    monkeypatch.setattr(module, "drag", recorded)
    steps = list(gooddrag(denoiser_of(unet, text), path, TASK, CONFIG))
    assert [step.level for step in steps] == [9] * 3 + [8] * 3 + [7] * 3
    for (latent, handles, origin), level, before in zip(
        told, (9, 8, 7), (None, steps[2], steps[5]), strict=True
    ):
        with torch.no_grad():
            view = observer(denoiser_of(unet, text), level, TASK, CONFIG)(path[level])
        assert origin.handles == TASK.handles and origin.view.level == level
        assert torch.equal(origin.view.features, view.features)
        assert torch.equal(origin.view.previous, view.previous)
        # One DDIM step down, from the last latent of the level above.
        time, below = (SCHEDULE.timestep(at, CONFIG.steps) for at in (level + 1, level))
        if before is not None:
            noise, _, _ = unet(before.latent, time, text)
            torch.testing.assert_close(latent, SCHEDULE.step(before.latent, noise, time, below))
            assert handles == before.handles
    assert torch.equal(told[0][0], path[9]) and told[0][1] == TASK.handles


@pytest.mark.parametrize("held", [0, 1, 2, 9])
def test_what_has_arrived_is_held_at_every_level(
    unet: UNet, text: Tensor, path: list[Tensor], held: int
) -> None:
    config = replace(CONFIG, tolerance=20.0, hold_steps=held)
    steps = list(gooddrag(denoiser_of(unet, text), path, TASK, config))
    updates = min(held, CONFIG.drag_steps)
    assert [step.level for step in steps] == [level for level in (9, 8, 7) for _ in range(updates + 1)]


def test_a_drag_that_stands_still_is_given_up(unet: UNet, text: Tensor, path: list[Tensor]) -> None:
    config = replace(CONFIG, drag_lr=0.0, track_radius=0, drag_levels=7)
    steps = list(gooddrag(denoiser_of(unet, text), path, TASK, config))
    assert {step.level for step in steps} == set(range(9, 9 - PATIENCE, -1))


def test_levels_end_with_the_last_denoising_step(unet: UNet, text: Tensor, path: list[Tensor]) -> None:
    config = replace(CONFIG, drag_levels=99, drag_steps=1, tolerance=0.0, track_radius=1)
    steps = list(gooddrag(denoiser_of(unet, text), path[:3], TASK, config))
    assert steps[-1].level >= 1


def test_a_warped_start_is_told_and_goes_on_from_the_moved_handles(
    unet: UNet, text: Tensor, path: list[Tensor]
) -> None:
    config = replace(CONFIG, warp_start=True, track_radius=0)
    first, second, *_ = gooddrag(denoiser_of(unet, text), path, TASK, config)
    with torch.no_grad():
        view = observer(denoiser_of(unet, text), 9, TASK, CONFIG)(path[9])
    latent, handles = warp(path[9], TASK, view.features)
    assert torch.equal(first.latent, path[9]) and first.handles == TASK.handles and first.loss is None
    assert torch.equal(second.latent, latent) and second.handles == handles and second.loss is None
    assert handles != TASK.handles


def test_radii_grow_with_the_grid_and_presets_keep_theirs() -> None:
    def scales(config: EditConfig, side: int) -> tuple[int, int, float]:
        found = config.scaled((side, 2 * side))
        return found.motion_radius, found.track_radius, found.motion_step

    assert scales(EditConfig(), 256) == (4, 12, 4.0)  # published
    assert scales(EditConfig(), 64) == (2, 6, 2.0)
    assert scales(EditConfig(), 128) == (3, 8, 4 * math.sqrt(0.5))
    assert scales(EditConfig(motion_radius=2, motion_step=1.0), 64) == (1, 6, 0.5)
    assert scales(EditConfig(scale_radii=False), 64) == (4, 12, 4.0)
    for preset in (EditConfig.paper(), EditConfig.official()):
        assert scales(preset, 256) == scales(preset, 64) == (1, 3, 1.0)
        assert preset.scaled((64, 64)) == preset
