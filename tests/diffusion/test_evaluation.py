import math
from dataclasses import replace

import pytest
import torch

from diffusion.config import DataConfig
from diffusion.data import Dataset, Examples, load_dataset
from diffusion.evaluation import Evaluator
from diffusion.feature_fitting import with_features
from diffusion.metrics import energy_distance, frechet_distance, kernel_distance

HARSH = {"num_train_timesteps": 200, "beta_start": 1e-4, "beta_end": 0.5}
GENTLE = {"num_train_timesteps": 2000, "beta_start": 1e-6, "beta_end": 0.004}


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


def test_the_error_curve_is_logged_at_even_log_snr(small_config, gaussian_dataset, gaussian_denoiser):
    """For N(0, I) data it is sigmoid(log-SNR), whichever schedule it was measured on."""
    for schedule in (HARSH, GENTLE):
        metrics, bound = exact_losses(schedule, small_config, gaussian_dataset, gaussian_denoiser)
        curve = {
            int(name.rsplit("_", 1)[1]): value
            for name, value in metrics.items()
            if name.startswith("val/mse_at_log_snr_")
        }
        low, high = bound.log_snr[0], bound.log_snr[-1]
        assert sorted(curve) == [n for n in range(-20, 21, 2) if low <= n <= high]
        assert {-8, -6, -4, -2, 0, 2, 4} <= curve.keys() if schedule is HARSH else curve.keys()
        for log_snr, error in curve.items():
            # Interpolated between timesteps that lie up to 0.8 apart.
            assert error == pytest.approx(1.0 / (1.0 + math.exp(-log_snr)), rel=0.12)


def test_nats_per_dim_of_points_are_their_entropy(small_config, gaussian_dataset, gaussian_denoiser):
    """200 steps, estimated from 32: N(0, 1) has ln(2 pi e) / 2 = 1.419 nats, and variance beta loses none."""
    config = small_config(schedule=HARSH, sampler={"variance": "beta"}, metrics={"num_examples": 4096})
    evaluator = Evaluator(config, gaussian_dataset(num_val=4096, seed=11))
    found = evaluator.discrete_bound(gaussian_denoiser(evaluator.schedule))
    assert found.keys() == {"val/nats_per_dim", "val/nats_per_dim_se"}
    spread = found["val/nats_per_dim_se"]
    assert 0.0 < spread < 0.03
    entropy = 0.5 * math.log(2.0 * math.pi * math.e)
    assert found["val/nats_per_dim"] == pytest.approx(entropy, abs=4.5 * spread)


def test_bits_per_dim_of_images_count_their_own_levels(small_config):
    """A network that knows each image pays for L_T, and for x_1's noise, which beyond half a step to
    either side says another one of the digits' 17 levels: on one side alone for white and for black."""
    images = load_dataset(DataConfig(name="digits"))
    small = Dataset(images.spec, images.train, Examples(images.val[:100]), images.test)
    config = small_config(schedule={"num_train_timesteps": 100, "beta_start": 0.002, "beta_end": 0.1})
    evaluator, x_0 = Evaluator(config, small), small.val[:64]
    a = torch.tensor(evaluator.schedule.alphas_cumprod, dtype=torch.float32)

    def network(x, t):
        signal = a[t].reshape(-1, 1, 1, 1)
        return (x - signal.sqrt() * x_0) / (1.0 - signal).sqrt()

    found = evaluator.discrete_bound(network)
    assert found.keys() == {"val/bits_per_dim", "val/bits_per_dim_se"}
    pixels = torch.from_numpy(small.raw(x_0)).round()
    half = 0.5 / images.spec.std[0][0][0] / 0.002**0.5
    beyond = 0.5 * math.erfc(half / 2.0**0.5)
    sides = torch.where((pixels == 0) | (pixels == 16), 1.0, 2.0)
    last, moment = evaluator.schedule.alphas_cumprod[-1], x_0.double().square().mean(dim=(1, 2, 3))
    prior = (moment * last - last - math.log1p(-last)) / 2.0
    expected = (prior - torch.log1p(-sides * beyond).mean(dim=(1, 2, 3))) / math.log(2.0)
    assert found["val/bits_per_dim"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found["val/bits_per_dim_se"] == pytest.approx(expected.std().item() / 8.0, rel=1e-3)
    ignorant = evaluator.discrete_bound(lambda x, t: 0.0 * x)
    assert ignorant["val/bits_per_dim"] > math.log2(17)


def test_the_discrete_bound_costs_less_than_the_windowed_one(small_config, gaussian_dataset):
    calls = []

    def network(x, t):
        calls.append(len(x))
        return 0.1 * x

    for schedule in (HARSH, GENTLE):
        evaluator = Evaluator(small_config(schedule=schedule), gaussian_dataset(num_val=64))
        calls.clear()
        evaluator.discrete_bound(network)
        discrete = sum(calls)
        calls.clear()
        evaluator.held_out_losses(network)
        assert discrete < sum(calls) - 64 * 16  # val/mse's own


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
                evaluator.samples(network, evaluator.dataset.val[:], num_samples=50, seed=4),
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
    found = evaluator.samples(
        gaussian_denoiser(evaluator.schedule), evaluator.dataset.val[:], num_samples=2000, seed=5
    )
    assert abs(found["sample/distance"]) < 0.01
    assert abs(found["sample/distance_floor"]) < 0.01
    assert found["sample/num_samples"] == 2000
    assert found["sample/network_evaluations"] == 100
    far = evaluator.samples(
        gaussian_denoiser(evaluator.schedule, mean=1.0), evaluator.dataset.val[:], num_samples=2000, seed=5
    )
    assert far["sample/distance"] > 0.3


def test_the_floor_is_the_distance_of_training_examples_and_their_number_the_limit(
    small_config, gaussian_dataset, gaussian_denoiser
):
    dataset = gaussian_dataset(num_train=70, num_val=50)
    evaluator = Evaluator(small_config(sampler={"num_steps": 50}), dataset)
    found = evaluator.samples(gaussian_denoiser(evaluator.schedule), dataset.val[:], num_samples=1000, seed=1)
    assert found["sample/num_samples"] == 70
    assert found["sample/network_evaluations"] == 10  # all that the schedule has
    floor = energy_distance(dataset.train[:], dataset.val[:])
    assert found["sample/distance_floor"] == floor.value
    assert found["sample/distance_floor_se"] == floor.standard_error


def test_images_are_compared_by_their_features(small_config, gaussian_denoiser):
    images = load_dataset(DataConfig(name="digits"))
    parts = (images.train[:200], images.val[:100], images.test[:100])
    small = with_features(Dataset(images.spec, *map(Examples, parts)), "random")
    evaluator = Evaluator(small_config(), small)
    network = gaussian_denoiser(evaluator.schedule)
    found = evaluator.samples(network, small.val[:], num_samples=150, seed=1)
    features = [
        small.features(torch.from_numpy(small.raw(split))) for split in (small.train[:150], small.val[:])
    ]
    for name, floor in (
        ("distance", kernel_distance(*features)),
        ("kid", kernel_distance(*features)),
        ("frechet", frechet_distance(*features)),
    ):
        assert found[f"sample/{name}_floor"] == pytest.approx(floor.value, rel=1e-9)
        assert found[f"sample/{name}_floor_se"] == pytest.approx(floor.standard_error, rel=1e-9)
        assert found[f"sample/{name}"] > floor.value + 5.0 * floor.standard_error
    bare = Evaluator(small_config(), replace(small, features=None))
    assert bare.samples(network, small.val[:], num_samples=150, seed=1) == found, "random ones where none are"


def test_samples_that_are_not_finite_are_counted_and_have_their_floor(small_config, gaussian_dataset):
    evaluator = Evaluator(small_config(sampler={"clip": False}), gaussian_dataset())
    found = evaluator.samples(lambda x, t: float("nan") * x, evaluator.dataset.val[:], num_samples=20, seed=1)
    assert found["sample/distance"] == math.inf
    assert {"sample/num_samples", "sample/num_reference", "sample/distance_floor"} <= found.keys()


def test_as_few_samples_as_a_config_allows_are_judged(small_config, gaussian_dataset, gaussian_denoiser):
    evaluator = Evaluator(small_config(metrics={"num_samples": 2}), gaussian_dataset())
    found = evaluator.samples(
        gaussian_denoiser(evaluator.schedule), evaluator.dataset.val[:], num_samples=2, seed=1
    )
    assert found["sample/num_samples"] == 2
