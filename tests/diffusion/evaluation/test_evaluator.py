import math
from dataclasses import replace

import pytest
import torch

from diffusion.config import DataConfig
from diffusion.data.dataset import Dataset, Split, load_dataset
from diffusion.evaluation.distances import frechet_distance, kernel_distance, kernel_inception_distance
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features import fit_features

pytestmark = pytest.mark.usefixtures("small_reference")

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


def test_equally_good_denoisers_have_the_same_bound_and_very_different_errors(
    small_config, gaussian_dataset, gaussian_denoiser
):
    """Why sweeps do not minimise val/mse: for the exact denoiser on either schedule it differs with the
    schedule, while val/elbo_window is the same."""
    (harsh, _), (gentle, _) = (
        exact_losses(schedule, small_config, gaussian_dataset, gaussian_denoiser)
        for schedule in (HARSH, GENTLE)
    )
    assert gentle["val/mse"] > 3.0 * harsh["val/mse"]
    standard_error = math.hypot(harsh["val/elbo_window_se"], gentle["val/elbo_window_se"])
    assert abs(harsh["val/elbo_window"] - gentle["val/elbo_window"]) < 3.0 * standard_error + 0.01
    exact = 0.5 * (math.log1p(math.exp(5.0)) - math.log1p(math.exp(-8.0)))
    assert gentle["val/elbo_window"] == pytest.approx(exact, rel=0.02)


def test_a_better_denoiser_on_the_schedule_with_the_larger_mse_has_the_lower_bound(
    small_config, gaussian_dataset, gaussian_denoiser
):
    """Here val/mse would choose the wrong denoiser."""
    good, _ = exact_losses(GENTLE, small_config, gaussian_dataset, gaussian_denoiser)
    config = small_config(schedule=HARSH, metrics={"num_examples": 4096})
    evaluator = Evaluator(config, gaussian_dataset(num_val=4096, seed=11))
    bad, _ = evaluator.held_out_losses(gaussian_denoiser(evaluator.schedule, variance=2.0))
    assert bad["val/mse"] < good["val/mse"]
    assert bad["val/elbo_window"] > good["val/elbo_window"] + 0.05


def test_the_parts_of_the_bound_are_among_the_metrics(small_config, gaussian_dataset, gaussian_denoiser):
    metrics, bound = exact_losses(
        {"num_train_timesteps": 20, "beta_start": 0.1, "beta_end": 0.2},
        small_config,
        gaussian_dataset,
        gaussian_denoiser,
    )
    assert metrics["val/elbo_window"] == bound.value
    assert metrics["val/elbo_window_se"] == bound.standard_error
    # At the first timestep the variance of x_0 given x_t is 1 / 10; the window ends at an SNR of exp(5).
    expected = 0.5 * math.log1p((math.exp(5.0) - 9.0) / 10.0)
    assert metrics["val/elbo_window_above"] == pytest.approx(expected, rel=0.05)
    assert metrics["val/elbo_window_below"] > 0.0


def test_the_error_curve_is_among_the_metrics_at_even_log_snr(
    small_config, gaussian_dataset, gaussian_denoiser
):
    """For N(0, I) data it is sigmoid(log-SNR) on any schedule."""
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
            # Interpolated between timesteps that are up to 0.8 apart in log-SNR.
            assert error == pytest.approx(1.0 / (1.0 + math.exp(-log_snr)), rel=0.12)


def test_nats_per_dim_of_points_are_their_entropy(small_config, gaussian_dataset, gaussian_denoiser):
    """Estimated for 200 steps. N(0, 1) has ln(2 pi e) / 2 = 1.419 nats, and with variance beta the bound is
    tight."""
    config = small_config(schedule=HARSH, sampler={"variance": "beta"}, metrics={"num_examples": 4096})
    evaluator = Evaluator(config, gaussian_dataset(num_val=4096, seed=11))
    metrics = evaluator.discrete_bound(gaussian_denoiser(evaluator.schedule))
    assert metrics.keys() == {"val/nats_per_dim", "val/nats_per_dim_se"}
    standard_error = metrics["val/nats_per_dim_se"]
    assert 0.0 < standard_error < 0.03
    entropy = 0.5 * math.log(2.0 * math.pi * math.e)
    assert metrics["val/nats_per_dim"] == pytest.approx(entropy, abs=4.5 * standard_error)


def test_bits_per_dim_of_images_are_for_the_levels_of_the_data(small_config):
    """The bound of a network that knows each image consists of L_T and L_0. The latter comes from noise of
    x_1 beyond half a step between the digits' 17 levels: on both sides, but on one side only for white and
    for black."""
    images = load_dataset(DataConfig(name="digits"))
    small = Dataset(images.spec, images.train, Split(images.val[:100]), images.test)
    config = small_config(schedule={"num_train_timesteps": 100, "beta_start": 0.002, "beta_end": 0.1})
    evaluator, x_0 = Evaluator(config, small), small.val[:64]
    a = torch.tensor(evaluator.schedule.alphas_cumprod, dtype=torch.float32)

    def network(x, t):
        signal = a[t].reshape(-1, 1, 1, 1)
        return (x - signal.sqrt() * x_0) / (1.0 - signal).sqrt()

    metrics = evaluator.discrete_bound(network)
    assert metrics.keys() == {"val/bits_per_dim", "val/bits_per_dim_se"}
    pixels = torch.from_numpy(small.raw(x_0)).round()
    half = 0.5 / images.spec.std[0][0][0] / 0.002**0.5
    beyond = 0.5 * math.erfc(half / 2.0**0.5)
    sides = torch.where((pixels == 0) | (pixels == 16), 1.0, 2.0)
    last, moment = evaluator.schedule.alphas_cumprod[-1], x_0.double().square().mean(dim=(1, 2, 3))
    prior = (moment * last - last - math.log1p(-last)) / 2.0
    expected = (prior - torch.log1p(-sides * beyond).mean(dim=(1, 2, 3))) / math.log(2.0)
    assert metrics["val/bits_per_dim"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert metrics["val/bits_per_dim_se"] == pytest.approx(expected.std().item() / 8.0, rel=1e-3)
    untrained = evaluator.discrete_bound(lambda x, t: 0.0 * x)
    assert untrained["val/bits_per_dim"] > math.log2(17)


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
        assert discrete < sum(calls) - 64 * 16  # the calls for val/mse


def test_metrics_do_not_depend_on_the_global_random_state(small_config, gaussian_dataset, gaussian_denoiser):
    evaluator = Evaluator(small_config(), gaussian_dataset())
    network = gaussian_denoiser(evaluator.schedule)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(
            (
                evaluator.held_out_losses(network)[0],
                evaluator.sample_metrics(network, evaluator.dataset.val[:], num_samples=50, seed=4),
            )
        )
    assert results[0] == results[1]


def test_at_most_num_examples_of_the_validation_split_are_used(
    small_config, gaussian_dataset, gaussian_denoiser
):
    dataset = gaussian_dataset(num_val=100)
    for number, expected in ((30, 30), (1000, 100)):
        evaluator = Evaluator(small_config(metrics={"num_examples": number}), dataset)
        _, bound = evaluator.held_out_losses(gaussian_denoiser(evaluator.schedule))
        assert bound.per_example.shape == (expected,)


def test_validation_metrics_do_not_depend_on_the_test_split(
    small_config, gaussian_dataset, gaussian_denoiser
):
    dataset = gaussian_dataset()
    spoiled = replace(dataset, test=Split(torch.full_like(dataset.test[:], float("nan"))))
    one, other = (
        Evaluator(small_config(), data).held_out_losses(gaussian_denoiser(small_config().schedule.build()))[0]
        for data in (dataset, spoiled)
    )
    assert one == other


def test_clipping_in_the_bound_follows_the_sampler(small_config, gaussian_dataset):
    dataset = gaussian_dataset()
    assert Evaluator(small_config(sampler={"clip": True}), dataset).clip == dataset.spec.clip
    assert Evaluator(small_config(sampler={"clip": False}), dataset).clip is None


def test_samples_of_the_exact_denoiser_are_as_close_as_training_data(
    small_config, gaussian_dataset, gaussian_denoiser
):
    """DDPM with variance beta is exact for N(0, I) at every step except the last, from abar = 0.999."""
    config = small_config(
        schedule={"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2},
        sampler={"name": "ddpm", "variance": "beta", "num_steps": 100},
    )
    evaluator = Evaluator(config, gaussian_dataset(seed=11))
    metrics = evaluator.sample_metrics(
        gaussian_denoiser(evaluator.schedule), evaluator.dataset.val[:], num_samples=2000, seed=5
    )
    assert abs(metrics["sample/distance"]) < 0.01
    assert abs(metrics["sample/distance_floor"]) < 0.01
    assert metrics["sample/num_samples"] == 2000
    assert metrics["sample/network_evaluations"] == 100
    far = evaluator.sample_metrics(
        gaussian_denoiser(evaluator.schedule, mean=1.0), evaluator.dataset.val[:], num_samples=2000, seed=5
    )
    assert far["sample/distance"] > 0.3


def test_the_number_of_training_examples_limits_the_samples_and_a_fifth_are_the_floor(
    small_config, gaussian_dataset, gaussian_denoiser
):
    dataset = gaussian_dataset(num_train=70, num_val=50)
    evaluator = Evaluator(small_config(sampler={"num_steps": 50}), dataset)
    metrics = evaluator.sample_metrics(
        gaussian_denoiser(evaluator.schedule), dataset.val[:], num_samples=1000, seed=1
    )
    assert metrics["sample/num_samples"] == 70
    assert metrics["sample/network_evaluations"] == 10  # the schedule has no more timesteps
    reference = torch.cat([dataset.val[:], dataset.train[:56]])
    floor = kernel_distance(dataset.train[56:], reference)
    assert metrics["sample/distance_floor"] == pytest.approx(floor.value, abs=1e-9)
    assert metrics["sample/distance_floor_se"] == pytest.approx(floor.standard_error, abs=1e-9)


def test_samples_have_the_classes_of_the_training_examples_in_order(
    small_config, gaussian_dataset, monkeypatch
):
    """So that each class has the share that it has in the data; they start again where the examples end."""
    plain = gaussian_dataset(num_train=5, num_val=10)
    train = Split(plain.train[:], labels=torch.tensor([2, 0, 2, 1, 2]))
    dataset = replace(plain, spec=replace(plain.spec, classes=("a", "b", "c")), train=train)
    conditions = []

    def generate(*_, condition, **__):
        conditions.append(condition)
        return torch.zeros(7, 2)

    monkeypatch.setattr("diffusion.evaluation.evaluator.generate", generate)
    Evaluator(small_config(sampler={"guidance_scale": 1.5}), dataset).samples(None, num_samples=7, seed=0)
    (condition,) = conditions
    assert condition.labels.tolist() == [2, 0, 2, 1, 2, 2, 0]
    assert (condition.null_label, condition.guidance_scale) == (3, 1.5)


def test_images_are_compared_by_their_features(small_config, gaussian_denoiser):
    images = load_dataset(DataConfig(name="digits"))
    parts = (images.train[:200], images.val[:100], images.test[:100])
    small = Dataset(images.spec, *map(Split, parts))
    features_of = fit_features(small, "random")
    evaluator = Evaluator(small_config(), small, features_of)
    network = gaussian_denoiser(evaluator.schedule)
    with_features = evaluator.sample_metrics(network, small.val[:], num_samples=150, seed=1)
    features = [
        features_of(torch.from_numpy(small.raw(images)))
        for images in (small.train[:][160:], torch.cat([small.val[:], small.train[:160]]))
    ]
    for name, floor in (
        ("distance", kernel_distance(*features)),
        ("kid", kernel_inception_distance(*features)),
        ("frechet", frechet_distance(*features)),
    ):
        assert with_features[f"sample/{name}_floor"] == pytest.approx(floor.value, rel=1e-6)
        assert with_features[f"sample/{name}_floor_se"] == pytest.approx(floor.standard_error, rel=1e-6)
        assert with_features[f"sample/{name}"] > floor.value + 5.0 * floor.standard_error
    without_features = Evaluator(small_config(), small)
    metrics = without_features.sample_metrics(network, small.val[:], num_samples=150, seed=1)
    assert metrics == with_features, "without features, those of a random network are used"


def test_samples_that_are_not_finite_have_infinite_distance_and_a_floor(small_config, gaussian_dataset):
    evaluator = Evaluator(small_config(sampler={"clip": False}), gaussian_dataset())
    metrics = evaluator.sample_metrics(
        lambda x, t: float("nan") * x, evaluator.dataset.val[:], num_samples=20, seed=1
    )
    assert metrics["sample/distance"] == math.inf
    assert {"sample/num_samples", "sample/num_reference", "sample/distance_floor"} <= metrics.keys()


def test_the_smallest_num_samples_of_a_config_works(small_config, gaussian_dataset, gaussian_denoiser):
    evaluator = Evaluator(small_config(metrics={"num_samples": 2}), gaussian_dataset())
    metrics = evaluator.sample_metrics(
        gaussian_denoiser(evaluator.schedule), evaluator.dataset.val[:], num_samples=2, seed=1
    )
    assert metrics["sample/num_samples"] == 2
