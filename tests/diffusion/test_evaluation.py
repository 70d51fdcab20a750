import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.config import DataConfig
from diffusion.data import Dataset, Examples, load_dataset
from diffusion.evaluation import Evaluator, schedule_metrics
from diffusion.metrics import energy_distance, frechet_distance
from diffusion.schedules import NoiseSchedule, linear_betas

HARSH = {"num_train_timesteps": 200, "beta_start": 1e-4, "beta_end": 0.5}
GENTLE = {"num_train_timesteps": 2000, "beta_start": 1e-6, "beta_end": 0.004}


def test_schedule_metrics_are_those_of_the_last_and_first_timestep():
    schedule = NoiseSchedule(linear_betas(100, 1e-3, 0.05))
    metrics = schedule_metrics(schedule, num_values=3)
    last = float(np.prod(1.0 - schedule.betas))
    assert metrics["schedule/alphas_cumprod_T"] == pytest.approx(last, rel=1e-12)
    assert metrics["schedule/log_snr_min"] == pytest.approx(math.log(last / (1.0 - last)), rel=1e-9)
    assert metrics["schedule/log_snr_max"] == pytest.approx(math.log(0.999 / 0.001), rel=1e-9)
    assert metrics["schedule/prior_kl_total"] == pytest.approx(3.0 * metrics["schedule/prior_kl"], rel=1e-12)


def test_prior_kl_is_the_kl_to_the_prior_averaged_over_data_of_unit_second_moment():
    schedule = NoiseSchedule(linear_betas(100, 1e-3, 0.05))
    a = torch.tensor(schedule.alphas_cumprod[-1])
    x_0 = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_0 = x_0 / x_0.square().mean().sqrt()
    normals = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normals(a.sqrt() * x_0, (1.0 - a).sqrt()), normals(0.0, 1.0)
    ).mean()
    assert schedule_metrics(schedule, 1)["schedule/prior_kl"] == pytest.approx(kl.item(), rel=1e-9)


def exact_losses(schedule, small_config, gaussian_dataset, gaussian_denoiser):
    config = small_config(schedule=schedule, metrics={"num_examples": 4096})
    evaluator = Evaluator(config, gaussian_dataset(num_val=4096, seed=11))
    return evaluator.held_out_losses(gaussian_denoiser(evaluator.schedule))


@pytest.mark.parametrize(
    "schedule", [HARSH, GENTLE, {"num_train_timesteps": 1, "beta_start": 0.3, "beta_end": 0.3}]
)
def test_mse_of_the_exact_denoiser_is_the_mean_of_alphas_cumprod(
    schedule, small_config, gaussian_dataset, gaussian_denoiser
):
    """For N(0, I) data the error of E[epsilon | x_t] at t is abar_t; val/mse averages over uniform t."""
    metrics, _ = exact_losses(schedule, small_config, gaussian_dataset, gaussian_denoiser)
    expected = small_config(schedule=schedule).schedule.build().alphas_cumprod.mean()
    # 8,192 squared errors, each of variance 2 (error)^2 at most.
    assert metrics["val/mse"] == pytest.approx(expected, abs=4.5 * math.sqrt(2.0 / 8192))


def test_equally_good_denoisers_have_one_bound_and_far_apart_errors(
    small_config, gaussian_dataset, gaussian_denoiser
):
    """The fact that the project turns on: with the exact denoiser under either schedule val/mse ranks
    the schedules, and val/elbo_window the denoisers, which are the same."""
    (harsh, _), (gentle, _) = (
        exact_losses(schedule, small_config, gaussian_dataset, gaussian_denoiser)
        for schedule in (HARSH, GENTLE)
    )
    assert gentle["val/mse"] > 3.0 * harsh["val/mse"]
    spread = math.hypot(harsh["val/elbo_window_se"], gentle["val/elbo_window_se"])
    assert abs(harsh["val/elbo_window"] - gentle["val/elbo_window"]) < 3.0 * spread + 0.01
    exact = 0.5 * (math.log1p(math.exp(5.0)) - math.log1p(math.exp(-8.0)))
    assert gentle["val/elbo_window"] == pytest.approx(exact, rel=0.02)


def test_a_better_denoiser_on_the_schedule_with_the_larger_mse_has_the_lower_bound(
    small_config, gaussian_dataset, gaussian_denoiser
):
    """Where the mean squared errors would choose the wrong one."""
    good, _ = exact_losses(GENTLE, small_config, gaussian_dataset, gaussian_denoiser)
    config = small_config(schedule=HARSH, metrics={"num_examples": 4096})
    evaluator = Evaluator(config, gaussian_dataset(num_val=4096, seed=11))
    bad, _ = evaluator.held_out_losses(gaussian_denoiser(evaluator.schedule, variance=2.0))
    assert bad["val/mse"] < good["val/mse"]
    assert bad["val/elbo_window"] > good["val/elbo_window"] + 0.05


def test_parts_of_the_bound_are_logged_with_it(small_config, gaussian_dataset, gaussian_denoiser):
    metrics, bound = exact_losses(
        {"num_train_timesteps": 20, "beta_start": 0.1, "beta_end": 0.2},
        small_config,
        gaussian_dataset,
        gaussian_denoiser,
    )
    assert metrics["val/elbo_window"] == bound.value
    assert metrics["val/elbo_window_se"] == bound.standard_error
    assert metrics["val/elbo_window_above"] == pytest.approx(0.5 * (5.0 - math.log(9.0)), abs=1e-9)
    assert metrics["val/elbo_window_below"] > 0.0


def test_judgement_does_not_depend_on_the_state_of_the_process(
    small_config, gaussian_dataset, gaussian_denoiser
):
    evaluator = Evaluator(small_config(), gaussian_dataset())
    network = gaussian_denoiser(evaluator.schedule)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(
            (
                evaluator.held_out_losses(network)[0],
                evaluator.sample_distance(network, evaluator.dataset.val[:], num_samples=50, seed=4),
            )
        )
    assert results[0] == results[1]


def test_at_most_num_examples_of_the_validation_split_are_judged(
    small_config, gaussian_dataset, gaussian_denoiser
):
    dataset = gaussian_dataset(num_val=100)
    for number, expected in ((30, 30), (1000, 100)):
        evaluator = Evaluator(small_config(metrics={"num_examples": number}), dataset)
        _, bound = evaluator.held_out_losses(gaussian_denoiser(evaluator.schedule))
        assert bound.per_example.shape == (expected,)


def test_the_test_split_does_not_touch_the_sweeps_figures(small_config, gaussian_dataset, gaussian_denoiser):
    dataset = gaussian_dataset()
    spoiled = replace(dataset, test=Examples(torch.full_like(dataset.test[:], float("nan"))))
    one, other = (
        Evaluator(small_config(), data).held_out_losses(gaussian_denoiser(small_config().schedule.build()))[0]
        for data in (dataset, spoiled)
    )
    assert one == other


def test_clipping_in_the_bound_follows_the_sampler(small_config, gaussian_dataset):
    dataset = gaussian_dataset()
    assert Evaluator(small_config(sampler={"clip": True}), dataset).clip == dataset.spec.clip
    assert Evaluator(small_config(sampler={"clip": False}), dataset).clip is None


def test_samples_of_the_exact_denoiser_are_as_near_as_training_data(
    small_config, gaussian_dataset, gaussian_denoiser
):
    """DDPM with variance beta is exact for N(0, I) at every step but the last, here from abar = 0.999 on."""
    config = small_config(
        schedule={"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2},
        sampler={"name": "ddpm", "variance": "beta", "num_steps": 100},
    )
    evaluator = Evaluator(config, gaussian_dataset(seed=11))
    found = evaluator.sample_distance(
        gaussian_denoiser(evaluator.schedule), evaluator.dataset.val[:], num_samples=2000, seed=5
    )
    assert abs(found["sample/distance"]) < 0.01
    assert abs(found["sample/distance_floor"]) < 0.01
    assert found["sample/num_samples"] == 2000
    assert found["sample/network_evaluations"] == 100
    far = evaluator.sample_distance(
        gaussian_denoiser(evaluator.schedule, mean=1.0), evaluator.dataset.val[:], num_samples=2000, seed=5
    )
    assert far["sample/distance"] > 0.3


def test_the_floor_is_the_distance_of_training_examples_and_their_number_the_limit(
    small_config, gaussian_dataset, gaussian_denoiser
):
    dataset = gaussian_dataset(num_train=70, num_val=50)
    evaluator = Evaluator(small_config(sampler={"num_steps": 50}), dataset)
    found = evaluator.sample_distance(
        gaussian_denoiser(evaluator.schedule), dataset.val[:], num_samples=1000, seed=1
    )
    assert found["sample/num_samples"] == 70
    assert found["sample/network_evaluations"] == 10  # all that the schedule has
    assert found["sample/distance_floor"] == energy_distance(dataset.train[:], dataset.val[:])


def test_images_are_compared_in_pixels_by_the_frechet_distance(small_config, gaussian_denoiser):
    images = load_dataset(DataConfig(name="digits"))
    parts = (images.train[:200], images.val[:100], images.test[:100])
    small = Dataset(images.spec, *map(Examples, parts))
    evaluator = Evaluator(small_config(), small)
    found = evaluator.sample_distance(
        gaussian_denoiser(evaluator.schedule), small.val[:], num_samples=150, seed=1
    )
    pixels = [torch.from_numpy(small.raw(split)) for split in (small.train[:150], small.val[:])]
    assert found["sample/distance_floor"] == pytest.approx(frechet_distance(*pixels), rel=1e-9)
    assert found["sample/distance"] > found["sample/distance_floor"]
