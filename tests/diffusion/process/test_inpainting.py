"""Inpainting and starts from given samples: which rows run, from which noise, and what comes out.

How close inpainting is to the truth is measured in tests/benchmarks/test_inpainting.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_repaint

from diffusion.process import samplers
from diffusion.process.generate import generate, sample_states
from diffusion.process.image_start import first_row, start_from
from diffusion.process.inpainting import JUMP_NOISE, KNOWN_NOISE, REPETITION, Inpainting, inject
from diffusion.process.samplers import last_sample, sampler_table, step, trajectory
from diffusion.process.sampling_methods import SamplingMethod, Stage, ddim
from diffusion.registry import SAMPLERS

SHAPE = (3, 4)
UNKNOWN = np.array([1.0, 0.0, 1.0, 0.0])
KNOWN = np.array([9.0, 0.5, -9.0, -0.25])  # the nines are not known


def denoise(x, t):
    """Some function that mixes the values of a sample."""
    return np.tanh(x + 0.3 * x[:, ::-1]) + 0.01 * t


def noise(index):
    return np.random.default_rng(index + 1).standard_normal(SHAPE)


def heun(steps):
    """Two rows a step, of which the second is evaluated where the first has led."""
    first = ddim(replace(steps, eta=0.0))[0]
    return [first, Stage(c=0.5, d=0.9, e=-0.2, s=0.1, timesteps=steps.timesteps_s)]


@pytest.fixture(name="two_rows")
def _two_rows(monkeypatch):
    method = SamplingMethod(stages=heun, rows_per_step=2)
    monkeypatch.setattr(samplers, "SAMPLERS", {**SAMPLERS, "two_rows": method})


def test_the_known_part_of_the_sample_is_exact(schedule):
    for name in SAMPLERS:
        x = last_sample(trajectory(denoise, noise(-1), sampler_table(schedule, name, 6), noise,
                                   Inpainting(KNOWN, UNKNOWN)))  # fmt: skip
        np.testing.assert_array_equal(x[:, 1], 0.5)
        np.testing.assert_array_equal(x[:, 3], -0.25)
        assert np.unique(x[:, [0, 2]]).size == 6


def test_with_nothing_known_the_samples_are_those_without(schedule):
    table = sampler_table(schedule, "ddpm", 6)
    x = last_sample(trajectory(denoise, noise(-1), table, noise, Inpainting(KNOWN, np.ones(4))))
    np.testing.assert_array_equal(x, last_sample(trajectory(denoise, noise(-1), table, noise)))


def test_every_row_and_its_noise_written_out(schedule):
    """Two runs of each of two steps, and the last row: k - 1 is the index of the noise."""
    table = sampler_table(schedule, "ddpm", 3)
    levels = table.alphas_cumprod

    def inject(x, level, index):
        known = np.sqrt(level) * KNOWN + (np.sqrt(1.0 - level) * noise(index) if level < 1.0 else 0.0)
        return np.where(UNKNOWN == 1.0, x, known)

    x, x0 = inject(noise(-1), levels[0], 2**31 - 1), np.zeros(SHAPE)
    for row in range(3):
        for repetition in range(2 if row < 2 else 1):
            index = row + repetition * 2**20
            if repetition:
                ratio = levels[row] / levels[row + 1]
                x = np.sqrt(ratio) * x + np.sqrt(1.0 - ratio) * noise(index + 2**31 + 2**30)
            out = denoise(x, table.timesteps[row])
            x, x0 = step(table.coefficients[row], x, out, x0, noise(index))
            x = inject(x, levels[row + 1], index + 2**31)
    actual = last_sample(trajectory(denoise, noise(-1), table, noise, Inpainting(KNOWN, UNKNOWN, 2)))
    np.testing.assert_allclose(actual, x, rtol=0, atol=1e-14)


def runs(table, *numbers):
    return [(each.row, each.repetition) for each in Inpainting(np.zeros(1), np.ones(1), *numbers).runs(table)]


def test_a_step_is_repeated_with_all_of_its_rows(schedule, two_rows):
    table = sampler_table(schedule, "two_rows", 3)
    assert runs(table, 2) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1), (4, 0)]


def test_jumps_repeat_several_steps_together(schedule):
    """The last block is shorter, and the last step runs once."""
    table = sampler_table(schedule, "ddim", 5)
    expected = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1), (4, 0)]
    assert runs(table, 2, 3) == expected
    signals = [each.signal for each in Inpainting(np.zeros(1), np.ones(1), 2, 3).runs(table)]
    levels = table.alphas_cumprod
    assert [each for each in signals if each is not None] == [levels[0] / levels[3], levels[3] / levels[4]]
    assert signals.index(levels[0] / levels[3]) == 3


@pytest.mark.parametrize("numbers", [(1, 1), (3, 1), (2, 4), (4, 100)])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_the_number_of_calls_is_known_before(schedule, numbers, num_steps):
    table = sampler_table(schedule, "ddim", num_steps)
    inpainting = Inpainting(KNOWN, UNKNOWN, *numbers)
    assert inpainting.num_runs(table) == len(list(trajectory(denoise, noise(-1), table, noise, inpainting)))


def test_no_noise_is_used_twice(schedule, two_rows):
    """Not even by 1,024 repetitions of the most rows that a file may have."""
    asked = []

    def recorded(index):
        asked.append(index)
        return noise(index)

    table = sampler_table(schedule, "ddpm", 5)
    last_sample(trajectory(denoise, noise(-1), table, recorded, Inpainting(KNOWN, UNKNOWN, 3, 2)))
    # The known part before each of 13 runs, z in all of them but the last, and 2 jumps in each of 2 blocks.
    assert len(asked) == len(set(asked)) == 13 + 12 + 4
    largest = 100_000 + 1023 * REPETITION
    assert largest < 2**30
    assert JUMP_NOISE + largest < 2**32
    assert KNOWN_NOISE + largest < JUMP_NOISE


@pytest.mark.parametrize("numbers", [(0, 1), (1025, 1), (2, 0)])
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match=r"give 1"):
        Inpainting(KNOWN, UNKNOWN, *numbers)


def test_a_first_timestep_without_signal_is_no_problem(schedule):
    """With zero terminal SNR the first jump goes back to pure noise."""
    table = sampler_table(schedule, "ddim", 4, prediction_type="sample")
    table = replace(table, alphas_cumprod=np.array([0.0, *table.alphas_cumprod[1:]]))
    x = last_sample(trajectory(denoise, noise(-1), table, noise, Inpainting(KNOWN, UNKNOWN, 2)))
    assert np.isfinite(x).all()


@pytest.mark.parametrize(("strength", "num_steps_run"), [(1.0, 10), (0.6, 6), (0.55, 6), (0.1, 1), (1e-9, 1)])
def test_strength_is_the_fraction_of_the_steps_that_run(schedule, two_rows, strength, num_steps_run):
    assert first_row(sampler_table(schedule, "ddim", 10), strength) == 10 - num_steps_run
    assert first_row(sampler_table(schedule, "two_rows", 10), strength) == 2 * (10 - num_steps_run)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_another_strength_is_refused(schedule, strength):
    with pytest.raises(ValueError, match="above 0, up to 1"):
        start_from(KNOWN, strength, sampler_table(schedule, "ddim", 4), noise)


def test_a_start_is_the_noised_sample_and_rows_keep_their_noise(schedule):
    table = sampler_table(schedule, "ddpm", 10)
    rest, rest_noise = start_from(KNOWN, 0.4, table, noise)
    level = table.alphas_cumprod[6]
    np.testing.assert_array_equal(rest_noise(-1), np.sqrt(level) * KNOWN + np.sqrt(1.0 - level) * noise(-1))
    np.testing.assert_array_equal(rest_noise(1), noise(7))
    np.testing.assert_array_equal(rest.timesteps, table.timesteps[6:])
    np.testing.assert_array_equal(rest.alphas_cumprod, table.alphas_cumprod[6:])
    assert rest.num_steps == 4


def test_the_whole_table_starts_from_the_sample_too(schedule):
    table = sampler_table(schedule, "dpmpp_2m", 10)
    rest, _ = start_from(KNOWN, 1.0, table, noise)
    np.testing.assert_array_equal(rest.coefficients, table.coefficients)


def test_a_multistep_sampler_starts_with_first_order(schedule):
    """dpmpp_2m is then DDIM in its first row, and itself in the others."""
    table = sampler_table(schedule, "dpmpp_2m", 10)
    first_order = sampler_table(schedule, "ddim", 10)
    assert table.column("e")[6] != 0.0
    rest = table.from_row(6)
    np.testing.assert_allclose(rest.coefficients[0], first_order.coefficients[6], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(rest.coefficients[1:], table.coefficients[7:])


def test_two_predictions_that_are_missing_are_replaced(schedule):
    """With constant predictions it makes no difference where a sampler of order 3 starts."""
    table = sampler_table(schedule, "dpmpp_2m", 8)
    extra = np.array([0.0, 0.0, 0.3, -0.2, 0.25, 0.1, -0.3, 0.0])
    table = replace(
        table, coefficients=np.column_stack([table.coefficients, extra]), columns=(*table.columns, "e2")
    )
    x0 = np.array([0.3, -0.7])

    def exact(x, t):
        a, b = table.coefficients[np.flatnonzero(table.timesteps == t)[0], :2]
        return (x0 - a * x) / b

    states = [x for x, _ in trajectory(exact, np.ones((1, 2)), table, lambda index: 0.0)]
    rest = [x for x, _ in trajectory(exact, states[3], table.from_row(4), lambda index: 0.0)]
    np.testing.assert_allclose(rest, states[4:], rtol=0, atol=1e-12)
    assert table.column("e2")[5] != 0.0


class Network(torch.nn.Module):
    def forward(self, x, t):
        return torch.tanh(x + 0.3 * x.flip(1)) + 0.01 * t[:, None]


def test_pytorch_inpaints_and_starts_as_numpy_does(schedule):
    """With x in float64; the network is the same function."""
    table = sampler_table(schedule, "ddpm", 6)
    rest, rest_noise = start_from(KNOWN, 0.5, table, noise)
    expected = last_sample(
        trajectory(denoise, rest_noise(-1), rest, rest_noise, Inpainting(KNOWN, UNKNOWN, 3))
    )

    def tensor_noise(index):
        return torch.from_numpy(noise(index))

    known = Inpainting(torch.from_numpy(KNOWN), torch.from_numpy(UNKNOWN), 3)
    rest, rest_noise = start_from(torch.from_numpy(KNOWN), 0.5, table, tensor_noise)
    actual = last_sample(sample_states(Network(), rest, rest_noise(-1), rest_noise, None, known))
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-5)


def test_generate_inpaints_and_starts(schedule):
    """The known part is exact; a weak start stays closer to the given samples than a strong one."""
    table = sampler_table(schedule, "ddim", 10)
    known = Inpainting(torch.tensor(KNOWN).float(), torch.tensor(UNKNOWN).float(), 2)
    x = generate(Network(), table, (4,), 5, seed=0, inpainting=known)
    assert (x[:, 1] == 0.5).all()
    x_0 = torch.full((5, 4), 0.2)
    weak, strong = (
        generate(Network(), table, (4,), 5, seed=0, x_0=x_0, strength=strength) for strength in (0.1, 1.0)
    )
    assert (weak - x_0).abs().mean() < 0.5 * (strong - x_0).abs().mean()
    with pytest.raises(ValueError, match="strength"):
        generate(Network(), table, (4,), 5, seed=0, x_0=x_0, strength=0.0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_run_and_jump_is_that_of_diffusers(schedule, eta, monkeypatch):
    """RePaintScheduler in float64, which has one noise for both parts. Its pipeline orders runs otherwise."""
    count, betas = schedule.num_train_timesteps, schedule.betas.copy()
    theirs = scheduling_repaint.RePaintScheduler(count, trained_betas=betas, eta=eta, clip_sample=False)
    theirs.betas, theirs.alphas_cumprod = torch.tensor(betas), torch.tensor(schedule.alphas_cumprod)
    theirs.final_alpha_cumprod, theirs.num_inference_steps = torch.tensor(1.0).double(), count
    known, mask = torch.from_numpy(KNOWN), torch.from_numpy(1.0 - UNKNOWN)

    def tensor_noise(index):
        return torch.from_numpy(noise(index % 2**30))  # one for both parts

    table = sampler_table(schedule, "ddim", count, eta=eta)
    x = inject(noise(-1), Inpainting(KNOWN, UNKNOWN), table.alphas_cumprod[0], lambda: noise(2**30 - 1))
    x = torch.from_numpy(x)
    for run in Inpainting(KNOWN, UNKNOWN, 2).runs(table):
        timestep, fresh = int(table.timesteps[run.row]), tensor_noise(run.noise_index)
        monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda *_, fresh=fresh, **__: fresh)
        if run.signal is not None:
            x = theirs.undo_step(x, timestep)
        out = torch.from_numpy(denoise(x.numpy(), timestep))
        x = theirs.step(out, timestep, x, known, mask).prev_sample
    ours = last_sample(
        trajectory(denoise, noise(-1), table, lambda index: noise(index if index < 0 else index % 2**30),
                   Inpainting(KNOWN, UNKNOWN, 2))
    )  # fmt: skip
    np.testing.assert_allclose(ours, x.numpy(), rtol=0, atol=1e-9)
