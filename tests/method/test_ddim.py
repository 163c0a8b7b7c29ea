"""The schedule and every step against diffusers' schedulers and the paper's formula."""

from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from torch import Tensor

from minidrag.config import EditConfig
from minidrag.method.ddim import Denoiser, KeysValues, NoisePredictor, Schedule, denoise, guided, invert

# As the official DragDiffusion builds it, whatever the model's scheduler_config.json names.
OFFICIAL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SCHEDULE = Schedule()
TEXT = torch.linspace(-1, 1, 77 * 8, dtype=torch.float64).reshape(1, 77, 8)
Compare = Callable[..., None]
Output = tuple[Tensor, list[Tensor], KeysValues]


def latents(batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 5, 6, generator=generator, dtype=torch.float64).to(dtype)


def fake_unet(
    latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None, /
) -> Output:
    """Smooth, bounded function of every argument, with the keys and values of three blocks."""
    own = [[(latent * 0.5 + timestep, latent - 0.25)], [], [(latent.sin(), latent.cos() + timestep)]]
    given = keys_values or []
    read = own[: 3 - len(given)] + given
    attended = torch.stack([(key * 0.001 + value).tanh() for key, value in chain(*read)]).sum(0)
    prompt = text.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
    return (latent * 0.7 + 0.2 * attended + prompt).tanh() * (1 + timestep / 1000), [latent], own


class Call(NamedTuple):
    """A call of a UNet."""

    latent: Tensor
    timestep: int | Tensor
    given: KeysValues | None
    own: KeysValues


class Recorder:
    """`fake_unet` that records every call."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(
        self, latent: Tensor, timestep: int | Tensor, text: Tensor, keys_values: KeysValues | None = None, /
    ) -> Output:
        noise, features, own = fake_unet(latent, timestep, text, keys_values)
        self.calls.append(Call(latent, timestep, keys_values, own))
        return noise, features, own


def predict_noise(latent: Tensor, timestep: int, text: Tensor) -> Tensor:
    return fake_unet(latent, timestep, text)[0]


def diffusers_path(
    scheduler: DDIMScheduler | DDIMInverseScheduler,
    latent: Tensor,
    steps: int,
    predict: Callable[[Tensor, int, Tensor], Tensor],
) -> list[Tensor]:
    """All latents that a scheduler of diffusers passes through."""
    scheduler.set_timesteps(steps)
    path = [latent]
    for timestep in scheduler.timesteps.tolist():
        noise = predict(path[-1], timestep, TEXT)
        path.append(scheduler.step(noise, timestep, path[-1], return_dict=False)[0])
    return path


def timesteps(schedule: Schedule, steps: int) -> list[int]:
    """Timestep at which each denoising step calls the UNet."""
    return [schedule.timestep(level, steps) for level in range(steps, 0, -1)]


def inversion_path(unet: NoisePredictor, latent: Tensor, steps: int, count: int) -> list[Tensor]:
    """Latents of an inversion, the clean one first."""
    return [latent, *invert(Denoiser(unet, SCHEDULE, TEXT, steps), latent, count)]


def denoised(
    unet: NoisePredictor,
    latents: list[Tensor],
    steps: int,
    level: int,
    control_start: int = 0,
    control_blocks: int = 2,
) -> list[Tensor]:
    """Finished latents of the last `level` denoising steps."""
    config = EditConfig(
        steps=steps, inversion_steps=1, control_start=control_start, control_blocks=control_blocks
    )
    *_, finished = [latents, *denoise(Denoiser(unet, SCHEDULE, TEXT, steps), latents, level, config)]
    return finished


def ode_step(latent: Tensor, noise: Tensor, a_start: Tensor, a_end: Tensor) -> Tensor:
    """DDIM as the paper's ODE (eq. 13): x / sqrt(a) changes by eps times the change of sqrt((1 - a) / a)."""
    a_start, a_end = a_start.double(), a_end.double()
    change = ((1 - a_end) / a_end).sqrt() - ((1 - a_start) / a_start).sqrt()
    return a_end.sqrt() * (latent / a_start.sqrt() + change * noise)


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
@pytest.mark.parametrize("to_one", [False, True])
def test_alphas_are_bit_equal_to_diffusers(kind: str, to_one: bool) -> None:
    theirs = DDIMScheduler(**OFFICIAL | {"beta_schedule": kind, "set_alpha_to_one": to_one})
    ours = Schedule(beta_schedule=kind, set_alpha_to_one=to_one)
    assert ours.alphas_cumprod.dtype == torch.float32
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.equal(ours.alpha(-19), theirs.final_alpha_cumprod)
    assert torch.equal(ours.alpha(0), theirs.alphas_cumprod[0])


def test_worked_numbers() -> None:
    worked = {0: 0.99914998, 1: 0.99829602, 21: 0.98038065, 661: 0.10873847, 681: 0.09463683}
    worked |= {701: 0.08191665, 981: 0.00577550, 999: 0.00466010}
    for timestep, alpha in worked.items():
        assert abs(SCHEDULE.alpha(timestep).item() - alpha) < 6e-9
    assert timesteps(SCHEDULE, 50) == [981 - 20 * i for i in range(50)]
    assert timesteps(SCHEDULE, 50)[15] == timesteps(SCHEDULE, 50)[-35] == 681
    assert SCHEDULE.timestep(35, 50) == 681 and SCHEDULE.timestep(0, 50) == -19
    assert timesteps(SCHEDULE, 30)[0] == 958
    assert timesteps(SCHEDULE, 1) == [1]
    assert timesteps(SCHEDULE, 999) == list(range(999, 0, -1))


def test_timesteps_of_every_step_count_equal_diffusers() -> None:
    theirs = DDIMScheduler(**OFFICIAL)
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        assert timesteps(SCHEDULE, steps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [-1, 0, 1000, 1001, 5000])
def test_impossible_step_counts(steps: int) -> None:
    with pytest.raises(ValueError, match=f"^steps must be 1 to 999, got {steps}$"):
        SCHEDULE.check_steps(steps)


def test_every_possible_step_count_is_accepted() -> None:
    for steps in range(1, 1000):
        SCHEDULE.check_steps(steps)
    Schedule(steps_offset=0).check_steps(1000)
    Schedule(steps_offset=2).check_steps(998)


def test_zero_steps_change_nothing() -> None:
    [same] = denoised(fake_unet, [latents()], 50, 0)
    assert torch.equal(same, latents())


@pytest.mark.parametrize("steps", [50, 30, 7, 1, 999])
def test_every_denoising_step_against_diffusers(steps: int, compare: Compare) -> None:
    expected = diffusers_path(DDIMScheduler(**OFFICIAL), latents(), steps, predict_noise)
    config = EditConfig(steps=steps, inversion_steps=1)
    path = [
        latents(),
        *(z for (z,) in denoise(Denoiser(fake_unet, SCHEDULE, TEXT, steps), [latents()], steps, config)),
    ]
    assert len(path) == len(expected) == steps + 1
    for ours, theirs in zip(path, expected, strict=True):
        compare(f"DDIM, {steps} denoising steps", ours, theirs, atol=1e-12)


@pytest.mark.parametrize("steps", [50, 30, 7, 1, 999])
def test_every_inversion_step_against_diffusers(steps: int, compare: Compare) -> None:
    expected = diffusers_path(DDIMInverseScheduler(**OFFICIAL), latents(), steps, predict_noise)
    path = inversion_path(fake_unet, latents(), steps, steps)
    for ours, theirs in zip(path, expected, strict=True):
        compare(f"DDIM, {steps} inversion steps", ours, theirs, atol=1e-12)


def test_every_step_against_the_paper(compare: Compare) -> None:
    """Written without diffusers; float32 square roots differ from the float64 ones here by 1e-7."""
    a, noisier = SCHEDULE.alphas_cumprod, [latents()]
    for time in range(1, 701, 20):  # 35 of 50 steps; the UNet is called at the level that is reached
        noise = predict_noise(noisier[-1], time, TEXT)
        noisier.append(ode_step(noisier[-1], noise, a[max(time - 20, 0)], a[time]))
    for ours, reference in zip(inversion_path(fake_unet, latents(), 50, 35), noisier, strict=True):
        compare("DDIM, 35 inversion steps by the paper", ours, reference, atol=2e-6)
    latent = latents(seed=1)
    for time in range(681, 0, -20):
        latent = ode_step(latent, predict_noise(latent, time, TEXT), a[time], a[max(time - 20, 0)])
    [ours] = denoised(fake_unet, [latents(seed=1)], 50, 35)
    compare("DDIM, 35 denoising steps by the paper", ours, latent, atol=2e-6)


def test_the_unet_is_called_at_the_official_timesteps() -> None:
    recorder = Recorder()
    path = inversion_path(recorder, latents(), 50, 35)
    assert [call.timestep for call in recorder.calls] == list(range(1, 682, 20))
    for call, latent in zip(recorder.calls, path[:-1], strict=True):
        assert torch.equal(call.latent, latent)
    recorder = Recorder()
    denoised(recorder, path[-1:], 50, 35)
    assert [call.timestep for call in recorder.calls] == list(range(681, 0, -20))


def test_denoising_undoes_an_inversion_with_constant_noise() -> None:
    clean, noise = latents(dtype=torch.float32), latents(dtype=torch.float32, seed=1)

    def constant(*given: object) -> Output:
        return noise, [], []

    path = inversion_path(constant, clean, 50, 35)
    assert (path[35] - clean).abs().max() > 1
    [back] = denoised(constant, [path[35]], 50, 35)
    # The first step goes from a[0] to a[1] and the last one back: exact except for rounding.
    assert (back - clean).abs().max() < 3e-6


def test_inversion_does_not_change_its_latent_and_builds_no_graph() -> None:
    latent = latents().requires_grad_()
    before = latent.detach().clone()
    path = inversion_path(fake_unet, latent, 50, 35)
    assert len(path) == 36 and torch.equal(latent, before)
    assert not any(step.requires_grad or step.is_inference() for step in path[1:])


def test_a_generator_leaves_the_gradient_mode_to_its_consumer() -> None:
    assert torch.is_grad_enabled()
    for _ in invert(Denoiser(fake_unet, SCHEDULE, TEXT, 50), latents(), 2):
        assert torch.is_grad_enabled()


def test_a_step_has_gradients() -> None:
    latent, noise = latents().requires_grad_(), latents(seed=1).requires_grad_()
    SCHEDULE.step(latent, noise, 681, 661).sum().backward()
    a, b = SCHEDULE.alpha(681).double(), SCHEDULE.alpha(661).double()
    slope = (1 - b).sqrt() - (b / a * (1 - a)).sqrt()
    assert latent.grad is not None and noise.grad is not None
    torch.testing.assert_close(latent.grad, (b / a).sqrt().expand_as(latent), rtol=1e-6, atol=0)
    torch.testing.assert_close(noise.grad, slope.expand_as(noise), rtol=1e-6, atol=0)


def test_steps_with_the_same_noise_compose_and_invert() -> None:
    latent, noise = latents(), latents(seed=1)
    direct = SCHEDULE.step(latent, noise, 100, 900)
    in_two = SCHEDULE.step(SCHEDULE.step(latent, noise, 100, 350), noise, 350, 900)
    torch.testing.assert_close(direct, in_two, rtol=0, atol=2e-6)
    torch.testing.assert_close(SCHEDULE.step(direct, noise, 900, 100), latent, rtol=0, atol=2e-6)
    assert torch.equal(SCHEDULE.step(latent, noise, 21, -19), SCHEDULE.step(latent, noise, 21, 0))
    finished = Schedule(set_alpha_to_one=True).step(latent, noise, 1, -19)
    a = SCHEDULE.alpha(1)
    torch.testing.assert_close(finished, (latent - (1 - a).sqrt() * noise) / a.sqrt(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_in_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    latent, noise = latents(dtype=dtype), latents(dtype=dtype, seed=1)
    found = SCHEDULE.step(latent, noise, 681, 661)
    assert found.dtype == dtype
    assert torch.equal(found, SCHEDULE.step(latent.float(), noise.float(), 681, 661).to(dtype))
    # A float32 latent stays float32 with the half-precision noise of a UNet.
    assert SCHEDULE.step(latent.float(), noise, 681, 661).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_added_as_in_diffusers(dtype: torch.dtype) -> None:
    clean, noise, timestep = latents(4, dtype), latents(4, dtype, seed=1), torch.tensor([0, 1, 500, 999])
    # Annotated as int32; the training scripts of diffusers pass int64.
    expected = DDIMScheduler(**OFFICIAL).add_noise(clean, noise, timestep)  # pyright: ignore[reportArgumentType]
    assert torch.equal(SCHEDULE.add_noise(clean, noise, timestep), expected)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_edits_attend_to_the_original_in_the_last_blocks(blocks: int) -> None:
    recorder = Recorder()
    original, edit, other = latents(1), latents(1, seed=1), latents(1, seed=2)
    given = [original, edit, other]
    denoised(recorder, given, 50, 35, control_start=10, control_blocks=blocks)
    assert given[0] is original and len(given) == 3  # the caller's list does not change
    steps = [recorder.calls[i : i + 3] for i in range(0, 105, 3)]
    for done, (first, *edits) in enumerate(steps):
        assert first.given is None
        for call in edits:
            assert call.given == (first.own[3 - blocks :] if done >= 10 else None)
            assert call.timestep == first.timestep == 681 - 20 * done


@pytest.mark.parametrize("blocks", [1, 3])
def test_reference_latent_control_against_a_loop_by_hand(blocks: int, compare: Compare) -> None:
    original, edit = latents(1), latents(1, seed=1)
    expected_original, expected_edit = original, edit
    for step, time in enumerate(range(681, 0, -20)):
        noise, _, keys_values = fake_unet(expected_original, time, TEXT)
        given = keys_values[3 - blocks :] if step >= 4 else None
        edit_noise, _, _ = fake_unet(expected_edit, time, TEXT, given)
        expected_original = SCHEDULE.step(expected_original, noise, time, time - 20)
        expected_edit = SCHEDULE.step(expected_edit, edit_noise, time, time - 20)
    found = denoised(fake_unet, [original, edit], 50, 35, control_start=4, control_blocks=blocks)
    compare("reference-latent-control, original", found[0], expected_original)
    compare("reference-latent-control, edit", found[1], expected_edit)
    alone = [denoised(fake_unet, [latent], 50, 35)[0] for latent in (original, edit)]
    off = denoised(fake_unet, [original, edit], 50, 35, control_start=35)
    assert torch.equal(found[0], alone[0]) and not torch.equal(found[1], alone[1])
    assert torch.equal(off[0], alone[0]) and torch.equal(off[1], alone[1])


def test_an_edit_equal_to_the_original_stays_equal() -> None:
    first, second = denoised(fake_unet, [latents(), latents()], 50, 35)
    assert torch.equal(first, second)


# Classifier-free guidance.


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_classifier_free_guidance_against_a_loop_by_hand(guidance: float, compare: Compare) -> None:
    negative, latent = TEXT.flip(1) * 0.3 + 0.1, latents(1, seed=7)

    def predict(latent: Tensor, timestep: int, text: Tensor) -> Tensor:
        without = predict_noise(latent, timestep, negative)
        return without + guidance * (predict_noise(latent, timestep, text) - without)

    [*_, expected] = diffusers_path(DDIMScheduler(**OFFICIAL), latent, 50, predict)
    [found] = denoised(guided(fake_unet, negative, guidance), [latent], 50, 50)
    compare(f"classifier-free guidance of {guidance}, 50 steps", found, expected, atol=1e-12)


def test_guidance_passes_features_keys_and_values_through() -> None:
    """So a guided original can control a guided edit."""
    predict = guided(fake_unet, TEXT * 0, 3.0)
    noise, features, keys_values = predict(latents(1), 681, TEXT)
    assert noise.shape == (1, 4, 5, 6) and features[0].shape[0] == keys_values[0][0][0].shape[0] == 2
    controlled = predict(latents(1, seed=1), 681, TEXT, keys_values)[0]
    assert not torch.equal(controlled, predict(latents(1, seed=1), 681, TEXT)[0])
