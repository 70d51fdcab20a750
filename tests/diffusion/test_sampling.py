from itertools import product

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

from diffusion.sampling import COEFFICIENTS, SamplerTable, sampler_table, step, trajectory
from diffusion.schedules import NoiseSchedule, cosine_betas, linear_betas

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace", "logsnr")
TOTAL = 60
CLIP = 0.8


@pytest.fixture(name="schedule")
def _schedule():
    return NoiseSchedule(linear_betas(TOTAL, 1e-3, 0.2))


def column(table, name):
    return table.coefficients[:, COEFFICIENTS.index(name)]


def denoise(x, timestep):
    """An arbitrary smooth network; its outputs make some x0 leave the clip interval."""
    return torch.sin(1.7 * x + 0.05 * timestep) + 0.3 * x.roll(1, dims=-1)


def shared_noise(table, shape=(5, 2, 3)):
    """Start and fresh noise of every row; none where a sampler ends (diffusers adds some there)."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(len(table.timesteps) + 1, *shape, generator=generator, dtype=torch.float64)
    noise[-1] = 0.0
    return noise[0], noise[1:]


def our_trajectory(table):
    start, noise = shared_noise(table)
    return torch.stack([x for x, _ in trajectory(denoise, start, table, lambda row: noise[row])])


def with_exact_alphas(oracle, schedule):
    """Put our float64 quantities into a scheduler of diffusers, which computes its own in float32."""
    oracle.betas = torch.tensor(schedule.betas)
    oracle.alphas = torch.tensor(schedule.alphas)
    oracle.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
    oracle.one = oracle.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return oracle


def ddpm_oracle(table, schedule, monkeypatch, *, prediction_type, variance_type, spacing, clip):
    oracle = with_exact_alphas(
        scheduling_ddpm.DDPMScheduler(
            num_train_timesteps=TOTAL,
            trained_betas=schedule.betas.tolist(),
            variance_type=variance_type,
            clip_sample=clip is not None,
            clip_sample_range=CLIP,
            prediction_type=prediction_type,
            thresholding=False,
            timestep_spacing="leading" if spacing == "logsnr" else spacing,
            steps_offset=0,
            rescale_betas_zero_snr=False,
        ),
        schedule,
    )
    if spacing == "logsnr":
        oracle.set_timesteps(timesteps=table.timesteps.tolist())
    else:
        oracle.set_timesteps(len(table.timesteps))
    np.testing.assert_array_equal(oracle.timesteps, table.timesteps)
    x, noise = shared_noise(table)
    states = []
    for row, timestep in enumerate(oracle.timesteps):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=noise[row], **__: z)
        x = oracle.step(denoise(x, int(timestep)), timestep, x, return_dict=False)[0]
        states.append(x)
    return torch.stack(states)


def ddim_oracle(table, schedule, *, prediction_type, eta, spacing, clip, use_clipped_model_output):
    oracle = with_exact_alphas(
        scheduling_ddim.DDIMScheduler(
            num_train_timesteps=TOTAL,
            trained_betas=schedule.betas.tolist(),
            clip_sample=clip is not None,
            clip_sample_range=CLIP,
            set_alpha_to_one=True,
            steps_offset=0,
            prediction_type=prediction_type,
            thresholding=False,
            timestep_spacing=spacing,
            rescale_betas_zero_snr=False,
        ),
        schedule,
    )
    oracle.set_timesteps(len(table.timesteps))
    np.testing.assert_array_equal(oracle.timesteps, table.timesteps)
    x, noise = shared_noise(table)
    states = []
    for row, timestep in enumerate(oracle.timesteps):
        x = oracle.step(
            denoise(x, int(timestep)),
            int(timestep),
            x,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
            variance_noise=noise[row],
            return_dict=False,
        )[0]
        states.append(x)
    return torch.stack(states)


def assert_same_trajectory(ours, oracle):
    assert ours.shape == oracle.shape
    largest = oracle.abs().amax(dim=tuple(range(1, oracle.ndim)))
    difference = (ours - oracle).abs().amax(dim=tuple(range(1, oracle.ndim)))
    assert torch.isfinite(oracle).all()
    assert (difference <= 1e-10 * largest).all(), difference / largest


@pytest.mark.parametrize("clip", [None, (-CLIP, CLIP)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("variance", "variance_type"), [("beta_tilde", "fixed_small"), ("beta", "fixed_large")]
)
@pytest.mark.parametrize(
    ("spacing", "steps"),
    # One step of "linspace" is left out: numpy's linspace of one point is its start, ours the noisy end.
    [case for case in product(SPACINGS, [TOTAL, 12, 1]) if case != ("linspace", 1)],
)
def test_ddpm_follows_diffusers(
    schedule, monkeypatch, spacing, steps, variance, variance_type, prediction_type, clip
):
    table = sampler_table(
        schedule,
        "ddpm",
        steps,
        prediction_type=prediction_type,
        variance=variance,
        spacing=spacing,
        clip=clip,
    )
    oracle = ddpm_oracle(
        table,
        schedule,
        monkeypatch,
        prediction_type=prediction_type,
        variance_type=variance_type,
        spacing=spacing,
        clip=clip,
    )
    assert_same_trajectory(our_trajectory(table), oracle)


@pytest.mark.parametrize("use_clipped_model_output", [True, False], ids=["from_clipped", "from_raw"])
@pytest.mark.parametrize("clip", [None, (-CLIP, CLIP)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 12), ("trailing", 12), ("leading", TOTAL), ("linspace", TOTAL)]
)
def test_ddim_follows_diffusers(
    schedule, spacing, steps, eta, prediction_type, clip, use_clipped_model_output
):
    table = sampler_table(
        schedule,
        "ddim",
        steps,
        prediction_type=prediction_type,
        eta=eta,
        spacing=spacing,
        clip=clip,
        use_clipped_model_output=use_clipped_model_output,
    )
    oracle = ddim_oracle(
        table,
        schedule,
        prediction_type=prediction_type,
        eta=eta,
        spacing=spacing,
        clip=clip,
        use_clipped_model_output=use_clipped_model_output,
    )
    assert_same_trajectory(our_trajectory(table), oracle)


def test_the_clip_interval_of_the_oracle_tests_is_felt(schedule):
    tables = [sampler_table(schedule, "ddim", 12, clip=clip) for clip in (None, (-CLIP, CLIP))]
    free, clipped = (our_trajectory(table) for table in tables)
    assert (free - clipped).abs().max() > 0.1
    assert clipped[-1].abs().max() <= CLIP


@pytest.mark.parametrize(("spacing", "prediction_type"), list(product(SPACINGS, PREDICTION_TYPES)))
def test_ddim_with_eta_1_is_ddpm_with_beta_tilde_row_by_row(schedule, spacing, prediction_type):
    for steps in (1, 7, TOTAL):
        options = {"prediction_type": prediction_type, "spacing": spacing, "clip": (-1.0, 2.0)}
        ddpm = sampler_table(schedule, "ddpm", steps, variance="beta_tilde", **options)
        ddim = sampler_table(schedule, "ddim", steps, eta=1.0, use_clipped_model_output=True, **options)
        np.testing.assert_array_equal(ddpm.timesteps, ddim.timesteps)
        np.testing.assert_allclose(ddim.coefficients, ddpm.coefficients, rtol=1e-9, atol=1e-12)


def test_respaced_to_every_timestep_ddpm_holds_the_schedules_posterior(schedule):
    table = sampler_table(schedule, "ddpm", TOTAL)
    np.testing.assert_allclose(column(table, "c")[::-1], schedule.posterior_mean_coef1, rtol=1e-9)
    np.testing.assert_allclose(column(table, "d")[::-1], schedule.posterior_mean_coef2, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(
        column(table, "s")[::-1] ** 2, schedule.posterior_variance, rtol=1e-9, atol=1e-15
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


@pytest.mark.parametrize("steps", [1, 2, 7, TOTAL])
def test_rules_that_every_table_keeps(schedule, steps):
    """Last row c=1, d=e=f=s=0; e=0 in the first; f=0 unless raw; alphas_cumprod travel along."""
    for options in ALL_TABLES:
        table = sampler_table(schedule, num_inference_steps=steps, clip=(-1.0, 3.0), **options)
        assert isinstance(table, SamplerTable)
        assert table.timesteps.dtype == np.int64
        assert table.coefficients.dtype == np.float64
        assert table.coefficients.shape == (steps, 9)
        assert np.isfinite(table.coefficients).all()
        assert table.coefficients[-1, 2:7].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
        assert column(table, "e")[0] == 0.0
        assert set(column(table, "lo")) == {-1.0}
        assert set(column(table, "hi")) == {3.0}
        assert (column(table, "s") >= 0.0).all()
        if options.get("use_clipped_model_output", True):
            assert not column(table, "f").any()
        np.testing.assert_array_equal(
            table.alphas_cumprod, np.append(schedule.alphas_cumprod[table.timesteps], 1.0)
        )


def test_without_a_clip_interval_the_limits_are_infinite(schedule):
    table = sampler_table(schedule, "ddim", 5)
    assert set(column(table, "lo")) == {-np.inf}
    assert set(column(table, "hi")) == {np.inf}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_and_b_recover_x_0_from_an_exact_output(schedule, rng, prediction_type):
    table = sampler_table(schedule, "ddim", 9, prediction_type=prediction_type)
    x_0, epsilon = rng.standard_normal((2, 50))
    for row, at in zip(table.coefficients, table.alphas_cumprod[:-1], strict=True):
        x_t = np.sqrt(at) * x_0 + np.sqrt(1.0 - at) * epsilon
        v = np.sqrt(at) * epsilon - np.sqrt(1.0 - at) * x_0
        out = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[prediction_type]
        _, found = step(row, x_t, out, 0.0, 0.0)
        np.testing.assert_allclose(found, x_0, rtol=1e-9, atol=1e-9)


def exact_coefficients(table, variance):
    """(factor of x, factor of z) of every row when the network is exact for x_0 ~ N(0, variance)."""
    for row, at in zip(table.coefficients, table.alphas_cumprod[:-1], strict=True):
        a, b, c, d, _, f, s, _, _ = row
        k = np.sqrt(1.0 - at) / (at * variance + 1.0 - at)
        yield c * (a + b * k) + d + f * k, s


@pytest.mark.parametrize("spacing", SPACINGS)
def test_for_standard_normal_data_ddpm_with_variance_beta_is_exact(schedule, spacing):
    """N(0, I) is then the forward process's stationary law: each row's result has variance 1 (but the
    last, which returns the mean). DDPM, arXiv:2006.11239, Section 3.2."""
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
def test_for_data_at_one_point_every_row_has_the_forward_processes_moments(
    schedule, spacing, sampler, options
):
    """DDIM, arXiv:2010.02502, Section 3: q_sigma(x_s | x_t, x_0) keeps the marginals
    N(sqrt(abar_s) x_0, 1 - abar_s) for every sigma; beta-tilde is its DDPM case."""
    table = sampler_table(schedule, sampler, 12, spacing=spacing, **options)
    point = 1.7
    at = table.alphas_cumprod
    mean, variance = np.sqrt(at[0]) * point, 1.0 - at[0]
    for index, row in enumerate(table.coefficients):
        a, b, c, d, _, f, s, _, _ = row
        # The exact epsilon is (x - sqrt(abar) point) / sqrt(1 - abar).
        k = 1.0 / np.sqrt(1.0 - at[index])
        constant = -np.sqrt(at[index]) * point * k
        factor = c * (a + b * k) + d + f * k
        mean = factor * mean + (c * b + f) * constant
        variance = factor**2 * variance + s**2
        assert mean == pytest.approx(np.sqrt(at[index + 1]) * point, rel=1e-10)
        assert variance == pytest.approx(1.0 - at[index + 1], abs=1e-10)


def ddim_error(steps, data_variance):
    schedule = NoiseSchedule(linear_betas(16384, 1e-6, 2.5e-3))
    table = sampler_table(schedule, "ddim", steps, spacing="logsnr")
    deviation = np.prod([factor for factor, _ in exact_coefficients(table, data_variance)])
    at = table.alphas_cumprod[0]
    exact = np.sqrt(data_variance / (at * data_variance + 1.0 - at))
    return abs(deviation - exact)


def test_deterministic_ddim_converges_to_the_flow_at_first_order():
    """The probability flow maps N(0, a v + 1 - a) to N(0, v) linearly; Euler's error halves with the step."""
    errors = np.array([ddim_error(steps, data_variance=4.0) for steps in (16, 32, 64, 128)])
    ratios = errors[:-1] / errors[1:]
    assert errors[-1] < 0.05 * 2.0  # of a deviation of 2
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


def test_numpy_and_torch_take_the_same_step(schedule, rng):
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


def test_a_step_is_the_written_formula_with_every_coefficient(rng):
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


def test_trajectory_hands_each_row_the_clipped_x0_of_the_row_before():
    """With c = d = 0 and e = 1 a row returns x0_previous: zeros first, then the clipped predictions."""
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
def test_trajectory_asks_for_noise_only_where_s_is_not_0(schedule, options, rows_with_noise):
    asked, told = [], []

    def noise(row):
        asked.append(row)
        return np.ones(3)

    def network(x, timestep):
        told.append(timestep)
        return 0.1 * x

    table = sampler_table(schedule, num_inference_steps=5, **options)
    states = list(trajectory(network, np.ones(3), table, noise))
    assert asked == rows_with_noise
    assert told == table.timesteps.tolist()
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
def test_impossible_samplers_are_refused_by_a_message_with_the_value(schedule, options, named):
    arguments = {"sampler": "ddim", "num_inference_steps": 10} | options
    with pytest.raises(ValueError, match=named):
        sampler_table(schedule, **arguments)


def test_epsilon_prediction_is_refused_where_no_signal_is_left():
    with pytest.raises(ValueError, match="alphas_cumprod reaches 0.*v_prediction"):
        sampler_table(NoiseSchedule([0.1, 1.0]), "ddim", 2, prediction_type="epsilon")
