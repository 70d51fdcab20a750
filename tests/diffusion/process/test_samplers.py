from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from benchmarks.diffusers_reference import (
    diffusers_trajectory,
    our_trajectory,
    relative_difference,
    shared_noise,
)
from diffusion.process.samplers import SamplerTable, sampler_table, step, trajectory
from diffusion.process.schedules import NoiseSchedule, cosine_betas, linear_betas
from tests.diffusion.process.conftest import CLIP, NUM_TRAIN_TIMESTEPS, PREDICTION_TYPES, SPACINGS


def assert_agreement(schedule, sampler, steps, **options):
    table = sampler_table(schedule, sampler, steps, **options)
    start, noise = shared_noise(table.num_rows)
    ours = our_trajectory(table, start, noise)
    theirs = diffusers_trajectory(sampler, table, schedule, start, noise, **options)
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    assert relative_difference(ours, theirs) <= 1e-10


@pytest.mark.parametrize("clip", [None, CLIP], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize(
    ("spacing", "steps"),
    # No single step of "linspace": diffusers then uses t = 0, our table the noisiest timestep.
    [case for case in product(SPACINGS, [NUM_TRAIN_TIMESTEPS, 12, 1]) if case != ("linspace", 1)],
)
def test_ddpm_agrees_with_diffusers(schedule, spacing, steps, variance, prediction_type, clip):
    options = {"prediction_type": prediction_type, "variance": variance, "spacing": spacing, "clip": clip}
    assert_agreement(schedule, "ddpm", steps, **options)


@pytest.mark.parametrize("use_clipped_model_output", [True, False], ids=["from_clipped", "from_raw"])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("leading", 12), ("trailing", 12), ("leading", NUM_TRAIN_TIMESTEPS), ("linspace", NUM_TRAIN_TIMESTEPS)],
)
def test_ddim_agrees_with_diffusers(
    schedule, spacing, steps, eta, prediction_type, clip, use_clipped_model_output
):
    assert_agreement(
        schedule,
        "ddim",
        steps,
        prediction_type=prediction_type,
        eta=eta,
        spacing=spacing,
        clip=clip,
        use_clipped_model_output=use_clipped_model_output,
    )


def test_the_clip_interval_of_these_tests_has_an_effect(schedule):
    tables = [sampler_table(schedule, "ddim", 12, clip=clip) for clip in (None, CLIP)]
    free, clipped = (our_trajectory(table, *shared_noise(12)) for table in tables)
    assert (free - clipped).abs().max() > 0.1
    assert clipped[-1].abs().max() <= CLIP[1]


@pytest.mark.parametrize(("spacing", "prediction_type"), list(product(SPACINGS, PREDICTION_TYPES)))
def test_ddim_with_eta_1_is_ddpm_with_beta_tilde_row_by_row(schedule, spacing, prediction_type):
    for steps in (1, 7, NUM_TRAIN_TIMESTEPS):
        options = {"prediction_type": prediction_type, "spacing": spacing, "clip": (-1.0, 2.0)}
        ddpm = sampler_table(schedule, "ddpm", steps, variance="beta_tilde", **options)
        ddim = sampler_table(schedule, "ddim", steps, eta=1.0, use_clipped_model_output=True, **options)
        np.testing.assert_array_equal(ddpm.timesteps, ddim.timesteps)
        np.testing.assert_allclose(ddim.coefficients, ddpm.coefficients, rtol=1e-9, atol=1e-12)


def test_with_every_timestep_ddpm_has_the_coefficients_of_the_posterior(schedule):
    table = sampler_table(schedule, "ddpm", NUM_TRAIN_TIMESTEPS)
    np.testing.assert_allclose(table.column("c")[::-1], schedule.posterior_mean_coef1, rtol=1e-9)
    np.testing.assert_allclose(table.column("d")[::-1], schedule.posterior_mean_coef2, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(
        table.column("s")[::-1] ** 2, schedule.posterior_variance, rtol=1e-9, atol=1e-15
    )


ALL_TABLES = [
    {"sampler": sampler, "prediction_type": prediction, "spacing": spacing, **options}
    for prediction in PREDICTION_TYPES
    for spacing in SPACINGS
    for sampler, options in [
        ("ddpm", {"variance": "beta_tilde"}),
        ("ddpm", {"variance": "beta"}),
        ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 0.7}),
        ("ddim", {"eta": 0.7, "use_clipped_model_output": False}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m", {"step_ratio_guard": None}),
    ]
]


@pytest.mark.parametrize("steps", [1, 2, 7, NUM_TRAIN_TIMESTEPS])
def test_invariants_of_every_table(schedule, steps):
    """c=1, d=e=f=s=0 in the last row; e=0 in the first; f=0 unless epsilon is taken from the raw output."""
    for options in ALL_TABLES:
        table = sampler_table(schedule, num_inference_steps=steps, clip=(-1.0, 3.0), **options)
        assert isinstance(table, SamplerTable)
        assert table.timesteps.dtype == np.int64
        assert table.coefficients.dtype == np.float64
        assert table.coefficients.shape == (steps, 9)
        assert np.isfinite(table.coefficients).all()
        assert table.coefficients[-1, 2:7].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
        assert table.column("e")[0] == 0.0
        assert set(table.column("lo")) == {-1.0}
        assert set(table.column("hi")) == {3.0}
        assert (table.column("s") >= 0.0).all()
        if options.get("use_clipped_model_output", True):
            assert not table.column("f").any()
        np.testing.assert_array_equal(
            table.alphas_cumprod, np.append(schedule.alphas_cumprod[table.timesteps], 1.0)
        )


def test_the_last_step_of_a_two_stage_sampler_has_one_row(schedule):
    table = sampler_table(schedule, "ddim", 7)
    assert (table.num_rows, table.num_steps) == (7, 7)
    assert replace(table, rows_per_step=2).num_steps == 4


def test_without_a_clip_interval_the_limits_are_infinite(schedule):
    table = sampler_table(schedule, "ddim", 5)
    assert set(table.column("lo")) == {-np.inf}
    assert set(table.column("hi")) == {np.inf}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_and_b_recover_x_0_from_an_exact_output(schedule, rng, prediction_type):
    table = sampler_table(schedule, "ddim", 9, prediction_type=prediction_type)
    x_0, epsilon = rng.standard_normal((2, 50))
    for row, alphas_cumprod in zip(table.coefficients, table.alphas_cumprod[:-1], strict=True):
        signal, sigma = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)
        x_t = signal * x_0 + sigma * epsilon
        v = signal * epsilon - sigma * x_0
        out = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[prediction_type]
        _, x0 = step(row, x_t, out, 0.0, 0.0)
        np.testing.assert_allclose(x0, x_0, rtol=1e-9, atol=1e-9)


def exact_coefficients(table, variance):
    """(factor of x, factor of z) of every row if the network is exact for x_0 ~ N(0, variance)."""
    for row, alphas_cumprod in zip(table.coefficients, table.alphas_cumprod[:-1], strict=True):
        a, b, c, d, _, f, s, _, _ = row
        # The network's output is k x.
        k = np.sqrt(1.0 - alphas_cumprod) / (alphas_cumprod * variance + 1.0 - alphas_cumprod)
        yield c * (a + b * k) + d + f * k, s


@pytest.mark.parametrize("spacing", SPACINGS)
def test_for_standard_normal_data_ddpm_with_variance_beta_is_exact(schedule, spacing):
    """N(0, I) is the stationary distribution of the forward process, so the result of each row has variance
    1, except in the last row, which returns the mean. DDPM, arXiv:2006.11239, Section 3.2."""
    table = sampler_table(schedule, "ddpm", 12, variance="beta", spacing=spacing)
    variance = 1.0
    for factor, s in list(exact_coefficients(table, 1.0))[:-1]:
        variance = factor**2 * variance + s**2
        assert variance == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {"variance": "beta_tilde"}),
        ("ddim", {"eta": 0.0}),
        ("ddim", {"eta": 0.5}),
        ("ddim", {"eta": 0.5, "use_clipped_model_output": False}),
        ("ddim", {"eta": 1.0}),
    ],
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_for_data_at_one_point_every_row_has_the_moments_of_the_forward_process(
    schedule, spacing, sampler, options
):
    """DDIM, arXiv:2010.02502, Section 3: q_sigma(x_s | x_t, x_0) keeps the marginals
    N(sqrt(abar_s) x_0, 1 - abar_s) for every sigma; beta-tilde is its DDPM case."""
    table = sampler_table(schedule, sampler, 12, spacing=spacing, **options)
    point = 1.7
    alphas_cumprod = table.alphas_cumprod
    mean, variance = np.sqrt(alphas_cumprod[0]) * point, 1.0 - alphas_cumprod[0]
    for index, row in enumerate(table.coefficients):
        a, b, c, d, _, f, s, _, _ = row
        # The exact epsilon is (x - sqrt(abar) point) / sqrt(1 - abar).
        k = 1.0 / np.sqrt(1.0 - alphas_cumprod[index])
        constant = -np.sqrt(alphas_cumprod[index]) * point * k
        factor = c * (a + b * k) + d + f * k
        mean = factor * mean + (c * b + f) * constant
        variance = factor**2 * variance + s**2
        assert mean == pytest.approx(np.sqrt(alphas_cumprod[index + 1]) * point, rel=1e-10)
        assert variance == pytest.approx(1.0 - alphas_cumprod[index + 1], abs=1e-10)


def ddim_error(steps, data_variance):
    """Error of the factor by which DDIM multiplies x from noise to sample, for x_0 ~ N(0, data_variance)."""
    schedule = NoiseSchedule(linear_betas(16384, 1e-6, 2.5e-3))
    table = sampler_table(schedule, "ddim", steps, spacing="logsnr")
    factor = np.prod([factor for factor, _ in exact_coefficients(table, data_variance)])
    alphas_cumprod = table.alphas_cumprod[0]
    exact = np.sqrt(data_variance / (alphas_cumprod * data_variance + 1.0 - alphas_cumprod))
    return abs(factor - exact)


def test_deterministic_ddim_converges_to_the_probability_flow_at_first_order():
    """The flow maps N(0, a v + 1 - a) to N(0, v) linearly; a first-order error halves with the step."""
    errors = np.array([ddim_error(steps, data_variance=4.0) for steps in (16, 32, 64, 128)])
    ratios = errors[:-1] / errors[1:]
    assert errors[-1] < 0.05 * 2.0  # relative to a standard deviation of 2
    assert np.all((ratios > 1.7) & (ratios < 2.4)), ratios


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_gives_finite_rows(sampler, prediction_type):
    betas = cosine_betas(20)
    betas[-1] = 1.0
    for raw in (True, False):
        table = sampler_table(
            NoiseSchedule(betas), sampler, 10, prediction_type=prediction_type, use_clipped_model_output=raw
        )
        assert table.alphas_cumprod[0] == 0.0
        assert np.isfinite(table.coefficients[:, :7]).all()


def test_numpy_and_torch_compute_the_same_step(schedule, rng):
    x, out, x0_previous, z = rng.standard_normal((4, 6, 2))
    for options in (
        {"sampler": "ddpm"},
        {"sampler": "ddim", "eta": 0.5, "use_clipped_model_output": False},
        {"sampler": "dpmpp_2m"},
    ):
        for row in sampler_table(schedule, num_inference_steps=6, clip=(-0.5, 0.4), **options).coefficients:
            arrays = step(row, x, out, x0_previous, z)
            tensors = step(row, *(torch.from_numpy(values) for values in (x, out, x0_previous, z)))
            for array, tensor in zip(arrays, tensors, strict=True):
                np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-14, atol=1e-15)


def test_a_step_is_the_documented_formula_with_every_coefficient(rng):
    row = [0.5, -0.3, 0.7, 0.2, -0.4, 0.6, 0.9, -0.25, 0.35]
    x, out, x0_previous, z = rng.standard_normal((4, 100))
    x_next, x0 = step(row, x, out, x0_previous, z)
    expected_x0 = np.minimum(np.maximum(0.5 * x - 0.3 * out, -0.25), 0.35)
    np.testing.assert_allclose(x0, expected_x0, rtol=1e-14)
    np.testing.assert_allclose(
        x_next, 0.7 * expected_x0 + 0.2 * x - 0.4 * x0_previous + 0.6 * out + 0.9 * z, rtol=1e-12, atol=1e-14
    )
    assert (x0 == -0.25).any()
    assert (x0 == 0.35).any()


def test_trajectory_passes_the_clipped_x0_to_the_next_row():
    """With c = 0 and d = e = 1 a row adds x0_previous to x: zeros first, then the clipped predictions."""
    row = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, -1.0, 1.0]
    table = SamplerTable(np.array([2, 1, 0]), np.array([row] * 3), np.array([0.1, 0.2, 0.3, 1.0]))
    states = [
        float(x[0]) for x, _ in trajectory(lambda x, t: 0.0 * x, np.array([5.0]), table, lambda row: None)
    ]
    assert states == [5.0, 6.0, 7.0]


@pytest.mark.parametrize(
    ("options", "rows_with_noise"),
    [
        ({"sampler": "ddim", "eta": 0.0}, []),
        ({"sampler": "ddim", "eta": 0.3}, [0, 1, 2, 3]),
        ({"sampler": "dpmpp_2m"}, []),
        ({"sampler": "ddpm", "variance": "beta"}, [0, 1, 2, 3]),
    ],
)
def test_trajectory_requests_noise_only_if_s_is_not_0(schedule, options, rows_with_noise):
    requested_rows, timesteps = [], []

    def noise(row):
        requested_rows.append(row)
        return np.ones(3)

    def network(x, timestep):
        timesteps.append(timestep)
        return 0.1 * x

    table = sampler_table(schedule, num_inference_steps=5, **options)
    states = list(trajectory(network, np.ones(3), table, noise))
    assert requested_rows == rows_with_noise
    assert timesteps == table.timesteps.tolist()
    assert len(states) == 5
    np.testing.assert_array_equal(*states[-1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": "euler"}, "'euler'"),
        ({"prediction_type": "score"}, "'score'"),
        ({"variance": "learned"}, "'learned'"),
        ({"spacing": "even"}, "'even'"),
        ({"eta": 1.5}, "eta 1.5"),
        ({"eta": -0.1}, "eta -0.1"),
        ({"eta": float("nan")}, "eta nan"),
        ({"clip": (1.0, -1.0)}, r"\(1.0, -1.0\)"),
        ({"clip": (float("nan"), 1.0)}, "nan"),
        ({"num_inference_steps": 61}, "61"),
        ({"num_inference_steps": 0}, "0"),
    ],
)
def test_invalid_arguments_are_rejected_with_their_value(schedule, options, named):
    arguments = {"sampler": "ddim", "num_inference_steps": 10} | options
    with pytest.raises(ValueError, match=named):
        sampler_table(schedule, **arguments)


def test_epsilon_prediction_is_rejected_if_no_signal_is_left():
    with pytest.raises(ValueError, match="alphas_cumprod reaches 0.*v_prediction"):
        sampler_table(NoiseSchedule([0.1, 1.0]), "ddim", 2, prediction_type="epsilon")
