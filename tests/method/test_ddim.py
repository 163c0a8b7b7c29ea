"""The schedule and every step against diffusers' schedulers and against the paper's formula."""

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from minidrag.method.ddim import KeysValues, Schedule, denoise, guided, invert, sample

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


def latents(batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 5, 6, generator=generator, dtype=torch.float64).to(dtype)


def fake(
    latent: Tensor, timestep: int, text: Tensor, keys_values: KeysValues | None = None
) -> tuple[Tensor, list[Tensor], KeysValues]:
    """A smooth, bounded stand-in for the UNet that depends on all it is given and has keys and values."""
    own = [[(latent * 0.5 + timestep, latent - 0.25)], [], [(latent.sin(), latent.cos() + timestep)]]
    given = keys_values or []
    read = own[: 3 - len(given)] + given
    mixed = sum((key * 0.001 + value).tanh() for key, value in chain(*read))
    said = text.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
    return (latent * 0.7 + 0.2 * mixed + said).tanh() * (1 + timestep / 1000), [latent], own


class Recorder:
    """The stand-in, with a note of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, int, KeysValues | None, KeysValues]] = []

    def __call__(
        self, latent: Tensor, timestep: int, text: Tensor, keys_values: KeysValues | None = None
    ) -> tuple[Tensor, list[Tensor], KeysValues]:
        result = fake(latent, timestep, text, keys_values)
        self.calls.append((latent, timestep, keys_values, result[2]))
        return result


def diffusers_path(
    scheduler: object, latent: Tensor, steps: int, predict: Callable[..., Tensor]
) -> list[Tensor]:
    """All latents that a scheduler of diffusers passes through."""
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    path = [latent]
    for timestep in scheduler.timesteps:  # type: ignore[attr-defined]
        noise = predict(path[-1], int(timestep), TEXT)
        path.append(scheduler.step(noise, int(timestep), path[-1]).prev_sample)  # type: ignore[attr-defined]
    return path


def paper_move(latent: Tensor, noise: Tensor, a_start: Tensor, a_end: Tensor) -> Tensor:
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
    assert SCHEDULE.timesteps(50) == [981 - 20 * i for i in range(50)]
    assert SCHEDULE.timesteps(50)[15] == SCHEDULE.timesteps(50)[-35] == 681
    assert SCHEDULE.pairs(50)[15] == (681, 661) and SCHEDULE.pairs(50)[-1] == (1, -19)
    assert SCHEDULE.timesteps(30)[0] == 958
    assert SCHEDULE.timesteps(1) == [1]
    assert SCHEDULE.timesteps(999) == list(range(999, 0, -1))


def test_time_steps_of_every_count_are_those_of_diffusers() -> None:
    theirs = DDIMScheduler(**OFFICIAL)
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        assert SCHEDULE.timesteps(steps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [-1, 0, 1000, 1001, 5000])
def test_impossible_step_counts(steps: int) -> None:
    with pytest.raises(ValueError, match="1 to 999"):
        SCHEDULE.timesteps(steps)


@pytest.mark.parametrize("count", [-1, 51])
def test_impossible_counts_of_steps_taken(count: int) -> None:
    with pytest.raises(ValueError, match="0 to 50"):
        invert(fake, SCHEDULE, latents(), TEXT, 50, count)
    with pytest.raises(ValueError, match="0 to 50"):
        denoise(fake, SCHEDULE, [latents()], TEXT, 50, count)


def test_no_step_changes_nothing() -> None:
    [only] = invert(fake, SCHEDULE, latents(), TEXT, 50, 0)
    [same] = denoise(fake, SCHEDULE, [latents()], TEXT, 50, 0)
    assert torch.equal(only, latents()) and torch.equal(same, latents())


@pytest.mark.parametrize("steps", [50, 30, 7, 1, 999])
def test_every_denoising_step_against_diffusers(steps: int, compare: Compare) -> None:
    want = diffusers_path(DDIMScheduler(**OFFICIAL), latents(), steps, lambda *given: fake(*given)[0])
    got = [latents()]
    denoise(fake, SCHEDULE, got, TEXT, steps, steps, on_step=lambda done, latent: got.append(latent))
    assert len(got) == len(want) == steps + 1
    for ours, theirs in zip(got, want, strict=True):
        compare(f"DDIM, {steps} denoising steps", ours, theirs, atol=1e-12)


@pytest.mark.parametrize("steps", [50, 30, 7, 1, 999])
def test_every_inversion_step_against_diffusers(steps: int, compare: Compare) -> None:
    want = diffusers_path(DDIMInverseScheduler(**OFFICIAL), latents(), steps, lambda *given: fake(*given)[0])
    got = invert(fake, SCHEDULE, latents(), TEXT, steps, steps)
    for ours, theirs in zip(got, want, strict=True):
        compare(f"DDIM, {steps} inversion steps", ours, theirs, atol=1e-12)


def test_every_step_against_the_paper(compare: Compare) -> None:
    """Written without diffusers; the float32 square roots of both sides differ from float64 ones by 1e-7."""
    a, latent, up = SCHEDULE.alphas_cumprod, latents(), [latents()]
    for time in range(1, 701, 20):  # 35 of 50 steps: UNet asked at the level that is reached
        up.append(paper_move(up[-1], fake(up[-1], time, TEXT)[0], a[max(time - 20, 0)], a[time]))
    for ours, reference in zip(invert(fake, SCHEDULE, latent, TEXT, 50, 35), up, strict=True):
        compare("DDIM, 35 inversion steps by the paper", ours, reference, atol=2e-6)
    down = latents(seed=1)
    for time in range(681, 0, -20):
        down = paper_move(down, fake(down, time, TEXT)[0], a[time], a[max(time - 20, 0)])
    [ours] = denoise(fake, SCHEDULE, [latents(seed=1)], TEXT, 50, 35)
    compare("DDIM, 35 denoising steps by the paper", ours, down, atol=2e-6)


def test_the_unet_is_asked_at_the_official_time_indices() -> None:
    recorder = Recorder()
    path = invert(recorder, SCHEDULE, latents(), TEXT, 50, 35)
    assert [call[1] for call in recorder.calls] == list(range(1, 682, 20))
    assert all(torch.equal(call[0], latent) for call, latent in zip(recorder.calls, path[:-1], strict=True))
    recorder = Recorder()
    denoise(recorder, SCHEDULE, path[-1:], TEXT, 50, 35)
    assert [call[1] for call in recorder.calls] == list(range(681, 0, -20))


def test_constant_noise_is_undone() -> None:
    clean, noise = latents(dtype=torch.float32), latents(dtype=torch.float32, seed=1)

    def constant(*given: object) -> tuple[Tensor, list[Tensor], KeysValues]:
        return noise, [], []

    path = invert(constant, SCHEDULE, clean, TEXT, 50, 35)
    assert (path[35] - clean).abs().max() > 1  # it has gone somewhere
    [back] = denoise(constant, SCHEDULE, [path[35]], TEXT, 50, 35)
    # The first step leads from a[0] to a[1] and the last one back: exact but for rounding.
    assert (back - clean).abs().max() < 3e-6


def test_invert_keeps_the_whole_path_and_the_caller_latent() -> None:
    latent = latents().requires_grad_()
    before, seen = latent.detach().clone(), []
    path = invert(fake, SCHEDULE, latent, TEXT, 50, 35, on_step=lambda done, now: seen.append((done, now)))
    assert len(path) == 36 and path[0] is latent and torch.equal(latent, before)
    assert not any(step.requires_grad or step.is_inference() for step in path[1:])
    assert [done for done, _ in seen] == list(range(1, 36))
    assert all(now is step for (_, now), step in zip(seen, path[1:], strict=True))


def test_step_carries_gradients() -> None:
    latent, noise = latents().requires_grad_(), latents(seed=1).requires_grad_()
    SCHEDULE.step(latent, noise, 681, 661).sum().backward()
    a, b = SCHEDULE.alpha(681).double(), SCHEDULE.alpha(661).double()
    slope = (1 - b).sqrt() - (b / a * (1 - a)).sqrt()
    assert latent.grad is not None and noise.grad is not None
    torch.testing.assert_close(latent.grad, (b / a).sqrt().expand_as(latent), rtol=1e-6, atol=0)
    torch.testing.assert_close(noise.grad, slope.expand_as(noise), rtol=1e-6, atol=0)


def test_step_between_any_levels_is_one_way_for_all() -> None:
    """Up, down and in one leap or two: with the same noise the result is the same."""
    latent, noise = latents(), latents(seed=1)
    leap = SCHEDULE.step(latent, noise, 100, 900)
    two = SCHEDULE.step(SCHEDULE.step(latent, noise, 100, 350), noise, 350, 900)
    torch.testing.assert_close(leap, two, rtol=0, atol=2e-6)
    torch.testing.assert_close(SCHEDULE.step(leap, noise, 900, 100), latent, rtol=0, atol=2e-6)
    assert torch.equal(SCHEDULE.step(latent, noise, 21, -19), SCHEDULE.step(latent, noise, 21, 0))
    finished = Schedule(set_alpha_to_one=True).step(latent, noise, 1, -19)
    a = SCHEDULE.alpha(1)
    torch.testing.assert_close(finished, (latent - (1 - a).sqrt() * noise) / a.sqrt(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_moved_in_float32(dtype: torch.dtype) -> None:
    latent, noise = latents(dtype=dtype), latents(dtype=dtype, seed=1)
    got = SCHEDULE.step(latent, noise, 681, 661)
    assert got.dtype == dtype
    assert torch.equal(got, SCHEDULE.step(latent.float(), noise.float(), 681, 661).to(dtype))
    # A float32 latent stays one beside the half-precision noise of a UNet.
    assert SCHEDULE.step(latent.float(), noise, 681, 661).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_added_as_in_diffusers(dtype: torch.dtype) -> None:
    clean, noise, timestep = latents(4, dtype), latents(4, dtype, seed=1), torch.tensor([0, 1, 500, 999])
    want = DDIMScheduler(**OFFICIAL).add_noise(clean, noise, timestep)
    assert torch.equal(SCHEDULE.add_noise(clean, noise, timestep), want)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_edits_read_the_original_keys_and_values_of_the_last_blocks(blocks: int) -> None:
    recorder = Recorder()
    original, edit, other = latents(1), latents(1, seed=1), latents(1, seed=2)
    given = [original, edit, other]
    denoise(recorder, SCHEDULE, given, TEXT, 50, 35, control_start=10, control_blocks=blocks)
    assert given[0] is original and len(given) == 3  # the caller's list is left alone
    steps = [recorder.calls[i : i + 3] for i in range(0, 105, 3)]
    for done, (first, *edits) in enumerate(steps):
        assert first[2] is None
        for call in edits:
            assert call[2] == (first[3][3 - blocks :] if done >= 10 else None)
            assert call[1] == first[1] == 681 - 20 * done


@pytest.mark.parametrize("blocks", [1, 3])
def test_reference_latent_control_against_a_hand_loop(blocks: int, compare: Compare) -> None:
    original, edit = latents(1), latents(1, seed=1)
    want_original, want_edit = original, edit
    for step, time in enumerate(range(681, 0, -20)):
        noise, _, keys_values = fake(want_original, time, TEXT)
        edit_noise, _, _ = fake(want_edit, time, TEXT, keys_values[3 - blocks :] if step >= 4 else None)
        want_original = SCHEDULE.step(want_original, noise, time, time - 20)
        want_edit = SCHEDULE.step(want_edit, edit_noise, time, time - 20)
    got = denoise(fake, SCHEDULE, [original, edit], TEXT, 50, 35, control_start=4, control_blocks=blocks)
    compare("reference-latent-control, original", got[0], want_original)
    compare("reference-latent-control, edit", got[1], want_edit)
    alone = [denoise(fake, SCHEDULE, [latent], TEXT, 50, 35)[0] for latent in (original, edit)]
    off = denoise(fake, SCHEDULE, [original, edit], TEXT, 50, 35, control_start=35)
    assert torch.equal(got[0], alone[0]) and not torch.equal(got[1], alone[1])
    assert torch.equal(off[0], alone[0]) and torch.equal(off[1], alone[1])


def test_an_unchanged_edit_is_the_original() -> None:
    first, second = denoise(fake, SCHEDULE, [latents(), latents()], TEXT, 50, 35)
    assert torch.equal(first, second)


def test_on_step_sees_the_edit() -> None:
    seen: list[tuple[int, Tensor]] = []
    [_, edit] = denoise(
        fake, SCHEDULE, [latents(), latents(seed=1)], TEXT, 50, 35, on_step=lambda *now: seen.append(now)
    )
    assert [done for done, _ in seen] == list(range(1, 36)) and seen[-1][1] is edit


def test_classifier_free_guidance_against_a_hand_loop(compare: Compare) -> None:
    negative, shape = TEXT.flip(1) * 0.3 + 0.1, (1, 4, 5, 6)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(7)).double()

    def predict(latent: Tensor, time: int, text: Tensor) -> Tensor:
        without, with_text = fake(latent, time, negative)[0], fake(latent, time, text)[0]
        return without + 7.5 * (with_text - without)

    [*_, want] = diffusers_path(DDIMScheduler(**OFFICIAL), latent, 50, predict)
    generator = torch.Generator().manual_seed(7)
    got = sample(fake, SCHEDULE, TEXT, negative, shape, 50, 7.5, generator)
    compare("classifier-free guidance, 50 steps", got, want, atol=1e-12)
    assert got.dtype == torch.float64 and got.shape == shape
    plain = sample(fake, SCHEDULE, TEXT, negative, shape, 50, 1.0, torch.Generator().manual_seed(7))
    compare("guidance of 1", plain, denoise(fake, SCHEDULE, [latent], TEXT, 50, 50)[0])


def test_guidance_leaves_the_call_as_it_is() -> None:
    """Features, keys and values pass through, so a guided edit can be controlled by a guided original."""
    predict = guided(fake, TEXT * 0, 3.0)
    noise, features, used = predict(latents(1), 681, TEXT)
    assert noise.shape == (1, 4, 5, 6) and features[0].shape[0] == used[0][0][0].shape[0] == 2
    other = predict(latents(1, seed=1), 681, TEXT, used)[0]
    assert not torch.equal(other, predict(latents(1, seed=1), 681, TEXT)[0])


def test_the_seed_decides_the_sample() -> None:
    def draw(seed: int, text: Tensor = TEXT) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(fake, SCHEDULE, text, text * 0, (1, 4, 5, 6), 3, generator=generator)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    torch.testing.assert_close(draw(0, TEXT.float()).double(), draw(0), rtol=0, atol=1e-5)


def test_schedule_from_the_official_file() -> None:
    official = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert Schedule.from_json(official) == Schedule.from_json({}) == Schedule()
    other = Schedule.from_json({"beta_start": 0.001, "num_train_timesteps": 500, "steps_offset": 0})
    assert other == Schedule(beta_start=0.001, num_train_timesteps=500, steps_offset=0)
    assert len(other.alphas_cumprod) == 500 and other.timesteps(500)[-1] == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("prediction_type", "sample"),
        ("trained_betas", [0.1, 0.2]),
        ("rescale_betas_zero_snr", True),
        ("beta_schedule", "squaredcos_cap_v2"),
    ],
)
def test_schedules_that_are_not_known(key: str, value: object) -> None:
    with pytest.raises(ValueError, match="scheduler_config.json"):
        Schedule.from_json({key: value})
