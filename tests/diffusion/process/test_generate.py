import numpy as np
import pytest
import torch

from diffusion.config import SamplerConfig
from diffusion.process.generate import generate, sample_states
from diffusion.process.samplers import sampler_table, trajectory
from diffusion.process.schedules import NoiseSchedule, linear_betas


@pytest.fixture(name="schedule")
def _schedule():
    return NoiseSchedule(linear_betas(100, 1e-3, 0.2))


def test_sampler_config_builds_the_configured_table(schedule):
    sampler = SamplerConfig(name="ddim", num_steps=20, eta=0.4, spacing="leading", clip=True)
    found = sampler.build(schedule, (-2.0, 3.0), "v_prediction")
    expected = sampler_table(
        schedule, "ddim", 20, prediction_type="v_prediction", eta=0.4, spacing="leading", clip=(-2.0, 3.0)
    )
    np.testing.assert_array_equal(found.timesteps, expected.timesteps)
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)


def test_sampler_config_passes_on_the_variance(schedule):
    sampler = SamplerConfig(name="ddpm", num_steps=20, variance="beta", clip=False)
    found = sampler.build(schedule, (-2.0, 3.0), "epsilon")
    expected = sampler_table(schedule, "ddpm", 20, variance="beta", spacing="logsnr", clip=None)
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)
    assert np.isinf(found.coefficients[:, 7:]).all()


def test_more_steps_than_timesteps_use_every_timestep(schedule):
    found = SamplerConfig(num_steps=500).build(schedule, (-1.0, 1.0), "epsilon")
    np.testing.assert_array_equal(found.timesteps, np.arange(100)[::-1])


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddpm", "variance": "beta"},
        {"sampler": "ddpm", "variance": "beta_tilde"},
        {"sampler": "ddim", "eta": 0.0},
        {"sampler": "ddim", "eta": 0.5},
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_samples_of_the_exact_denoiser_have_the_moments_of_the_data(
    gaussian_denoiser, options, prediction_type
):
    mean, variance, count = torch.tensor([1.0, -0.5]), torch.tensor([0.25, 2.0]), 4000
    schedule = NoiseSchedule(linear_betas(400, 1e-4, 0.04))
    network = gaussian_denoiser(schedule, variance, mean, prediction_type)
    table = sampler_table(schedule, num_inference_steps=200, prediction_type=prediction_type, **options)
    samples = generate(network, table, (2,), count, seed=0)
    assert samples.shape == (count, 2)
    assert samples.dtype == torch.float32
    # The tolerance is the Monte Carlo error plus about 3% of discretisation error in the variance.
    assert ((samples.mean(dim=0) - mean).abs() < 4.5 * (variance / count).sqrt() + 0.01).all()
    assert ((samples.var(dim=0) / variance - 1.0).abs() < 4.5 * (2.0 / count) ** 0.5 + 0.03).all()


def test_samples_depend_only_on_the_seed(gaussian_denoiser, schedule):
    network = gaussian_denoiser(schedule)
    table = sampler_table(schedule, "ddpm", 10)
    torch.manual_seed(1)
    samples = generate(network, table, (1, 4, 4), 3, seed=5)
    torch.manual_seed(2)
    global_state = torch.get_rng_state()
    assert torch.equal(generate(network, table, (1, 4, 4), 3, seed=5), samples)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert not torch.equal(generate(network, table, (1, 4, 4), 3, seed=6), samples)


def test_samples_stay_within_the_clip_interval(gaussian_denoiser, schedule):
    table = SamplerConfig(num_steps=10).build(schedule, (-0.5, 0.75), "epsilon")
    samples = generate(gaussian_denoiser(schedule), table, (2,), 200, seed=0)
    assert samples.min().item() == -0.5
    assert samples.max().item() == 0.75


def test_the_samples_keep_their_dtype_while_the_network_receives_float32_and_int64(schedule):
    calls = []

    def network(x, timesteps):
        calls.append((x.dtype, timesteps.dtype, timesteps.tolist()))
        return 0.1 * x

    table = sampler_table(schedule, "ddim", 4)
    states = list(sample_states(network, table, torch.ones(3, 2, dtype=torch.float64), lambda row: None))
    assert {x.dtype for x, _ in states} == {torch.float64}
    assert len(states) == 4
    assert calls == [(torch.float32, torch.int64, [timestep] * 3) for timestep in table.timesteps.tolist()]


def test_sampling_agrees_with_the_numpy_trajectory(gaussian_denoiser, schedule):
    """With the network in float64, numpy and torch differ only by rounding."""
    network = gaussian_denoiser(schedule, 2.0)
    table = sampler_table(schedule, "ddpm", 20, clip=(-1.5, 1.5))
    noise = np.random.default_rng(0).standard_normal((21, 6, 2))

    def denoise(x, timestep):
        x = torch.from_numpy(x.astype(np.float32))
        return network(x, torch.full((6,), timestep)).double().numpy()

    states = sample_states(
        network, table, torch.from_numpy(noise[20]), lambda row: torch.from_numpy(noise[row])
    )
    for (with_torch, _), (with_numpy, _) in zip(
        states, trajectory(denoise, noise[20], table, lambda row: noise[row]), strict=True
    ):
        np.testing.assert_allclose(with_torch.numpy(), with_numpy, rtol=1e-5, atol=1e-5)


def test_sampling_leaves_no_gradient_behind(schedule):
    linear = torch.nn.Linear(2, 2)
    table = sampler_table(schedule, "ddim", 3)
    assert not generate(lambda x, t: linear(x), table, (2,), 4, seed=0).requires_grad
