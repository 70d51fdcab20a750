"""The sampler of a finished model: which is chosen, and what is measured."""

import dataclasses
import json
import math

import pytest
import torch

from diffusion.data.dataset import Dataset, Split
from diffusion.evaluation import sampler_choice
from diffusion.evaluation.sampler_choice import (
    MeasuredSampler,
    SamplerChoice,
    choose_sampler,
    measure_samplers,
    samplers_to_measure,
)
from tests.diffusion.conftest import MixtureDenoiser


def measured(name, evaluations, distance, auc=0.6, distance_se=0.02, auc_se=0.01):
    return MeasuredSampler(name, evaluations, evaluations, distance, distance_se, auc, auc_se)


def deployed(*samplers):
    return choose_sampler(samplers, 100).deployed


BEST = measured("ddpm", 100, 0.20)


def test_the_cheapest_within_one_standard_error_of_the_best_is_deployed():
    cheap, cheaper = measured("ddim", 50, 0.219), measured("ddim", 20, 0.221)
    assert deployed(BEST, cheap) == cheap
    assert deployed(cheaper, cheap, BEST) == cheap, "0.221 is more than one standard error above 0.2"


def test_the_auc_must_be_as_good_as_well():
    assert deployed(BEST, measured("ddim", 20, 0.20, auc=0.609)).name == "ddim"
    assert deployed(BEST, measured("ddim", 20, 0.21, auc=0.611)) == BEST


def test_the_errors_are_those_of_the_best():
    assert deployed(BEST, measured("ddim", 20, 0.23, distance_se=1.0)) == BEST


def test_the_best_is_close_to_the_smallest_of_both_metrics():
    """As measured: by distance alone dpmpp_2m is best, but a classifier tells its samples far more easily."""
    one_sided = measured("dpmpp_2m", 20, 0.190, auc=0.65)
    choice = choose_sampler([one_sided, BEST], 100)
    assert choice.best == choice.deployed == BEST
    compromise = measured("ddim", 50, 0.215, auc=0.62)
    choice = choose_sampler([one_sided, measured("ddpm", 100, 0.25, auc=0.60), compromise], 100)
    assert choice.best == choice.deployed == compromise, "2 errors away; the others are 5 and 3"


def test_a_dearer_sampler_is_deployed_only_if_it_is_better():
    better, equal = measured("ddpm", 200, 0.17), measured("ddpm", 200, 0.19)
    assert deployed(BEST, better) == better
    assert deployed(BEST, equal) == BEST


@pytest.mark.parametrize("distance", [math.inf, math.nan])
def test_samples_that_are_not_finite_are_never_deployed_beside_finite_ones(distance):
    assert deployed(measured("ddim", 10, distance, auc=1.0), BEST) == BEST
    assert deployed(BEST, measured("ddim", 10, distance, auc=1.0)) == BEST


def test_without_a_standard_error_the_best_is_deployed():
    unknown = measured("ddpm", 100, 0.20, distance_se=math.nan)
    assert deployed(measured("ddim", 20, 0.201), unknown) == unknown


def test_fast_is_the_best_of_at_most_20_evaluations():
    fast, worse = measured("dpmpp_2m", 20, 0.30), measured("ddim", 10, 0.31)
    assert choose_sampler([BEST, worse, fast, measured("ddim", 21, 0.25)], 100).fast == fast
    assert choose_sampler([BEST], 100).fast is None
    assert choose_sampler([BEST, measured("ddim", 20, math.inf, auc=1.0)], 100).fast is None


def test_the_price_of_the_fast_one_is_named():
    choice = choose_sampler([BEST, measured("ddim", 20, 0.35, auc=0.7)], 100)
    first, second = choice.sentences()
    assert first == "it samples by ddpm with 100 steps: the best of 2 choices of sampler and steps"
    assert second == (
        "fast: ddim with 20 steps costs 20 instead of 100 network evaluations, for an AUC of 0.700 instead "
        "of 0.600 and a distance of 0.35 instead of 0.2"
    )


def test_if_the_cheapest_is_fast_one_sentence_says_so():
    choice = choose_sampler([BEST, measured("ddim", 20, 0.21)], 100)
    assert choice.sentences() == [
        "it samples by ddim with 20 steps: of 2 choices of sampler and steps the cheapest within one "
        "standard error of the best, ddpm with 100 steps"
    ]


def test_a_choice_survives_json():
    for choice in (choose_sampler([BEST, measured("ddim", 20, 0.3)], 9), choose_sampler([BEST], 9)):
        assert SamplerChoice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice


def test_samples_that_are_not_finite_become_none_in_json():
    """A file's metadata have no NaN and no Infinity."""
    choice = choose_sampler([BEST, measured("ddim", 20, math.inf, distance_se=math.nan)], 9)
    content = json.loads(json.dumps(choice.to_dict(), allow_nan=False))
    assert content["measured"][0]["distance"] is None
    again = SamplerChoice.from_dict(content)
    assert math.isnan(again.measured[0].distance) and again.deployed == choice.deployed == BEST


@pytest.mark.parametrize(
    ("kind", "own", "timesteps", "numbers", "numbers_of_heun"),
    [
        ("points", 100, 1000, [10, 20, 50, 100, 200], [5, 10, 25, 50, 100]),
        ("points", 100, 60, [10, 20, 50, 60], [5, 10, 25, 50, 60]),
        ("points", 300, 1000, [10, 20, 50, 100, 200, 300], [5, 10, 25, 50, 100, 150]),
        ("image", 50, 1000, [10, 20, 50], [5, 10, 25]),
        ("image", 70, 1000, [10, 20, 50, 70], [5, 10, 25, 35]),
        ("image", 50, 5, [5], [5]),
    ],
)
def test_candidates_are_measured_at_several_numbers_of_network_evaluations(
    small_config, kind, own, timesteps, numbers, numbers_of_heun
):
    config = small_config(
        sampler={"num_steps": own, "name": "ddim", "eta": 0.5}, schedule={"num_train_timesteps": timesteps}
    )
    found = samplers_to_measure(config, kind)
    one_row = ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"]
    assert [(each.name, each.num_steps) for each in found] == [
        *((name, number) for name in one_row for number in numbers),
        *(("heun", number) for number in numbers_of_heun),
    ]
    # The config's eta is that of its own sampler alone.
    assert {each.name: each.eta for each in found} == {**dict.fromkeys((*one_row, "heun")), "ddim": 0.5}


def test_samplers_can_be_named_and_two_rows_a_step_count_as_two_evaluations(small_config):
    config = small_config(sampler={"num_steps": 30}, schedule={"num_train_timesteps": 1000})
    found = samplers_to_measure(config, "image", ["heun", "dpmpp_3m"])
    assert [(each.name, each.num_steps) for each in found] == [
        *(("dpmpp_3m", number) for number in (10, 20, 30, 50)),
        *(("heun", number) for number in (5, 10, 15, 25)),  # 9, 19, 29 and 49 evaluations
    ]
    own = small_config(
        sampler={"name": "heun_churn", "eta": 0.1, "num_steps": 30}, schedule={"num_train_timesteps": 1000}
    )
    found = samplers_to_measure(own, "image")
    assert [(each.num_steps, each.eta) for each in found if each.name == "heun_churn"][-1] == (30, 0.1)


@pytest.fixture(scope="module")
def two_lines():
    """Points on two short lines; few steps cannot tell them from what lies between."""
    weights, means = torch.tensor([0.5, 0.5]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    covariance = torch.tensor([[1e-4, 0.0], [0.0, 0.25]], dtype=torch.float64)
    return weights, means, covariance


def test_few_steps_of_an_exact_denoiser_measure_worse_and_are_not_deployed(
    small_config, gaussian_dataset, two_lines, few_trees, monkeypatch
):
    monkeypatch.setattr(sampler_choice, "_EVALUATIONS", {"points": (10, 100)})  # to save time
    weights, means, covariance = two_lines
    generator = torch.Generator().manual_seed(0)
    lines = torch.distributions.MultivariateNormal(means, covariance[None] + torch.zeros(2, 2, 2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = lines.sample((2500,))
    which = torch.randint(2, (2500,), generator=generator)
    x_0 = drawn[torch.arange(2500), which].float()
    poisoned = Split(torch.full((10, 2), math.nan))
    dataset = Dataset(gaussian_dataset().spec, Split(x_0[:2000]), Split(x_0[2000:]), poisoned)
    config = small_config(
        schedule={"num_train_timesteps": 200, "beta_start": 1e-4, "beta_end": 0.1},
        metrics={"num_samples": 600},
        sampler={"num_steps": 100},
    )
    network = MixtureDenoiser(config.schedule.build(), weights, means, covariance)
    lines_said = []
    choice = measure_samplers(config, network, dataset, None, lines_said.append)
    assert [line.split()[3] for line in lines_said] == [
        "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"
    ]  # fmt: skip
    by_steps = {(each.name, each.num_steps): each for each in choice.measured}
    assert by_steps["ddpm", 10].distance > 3 * by_steps["ddpm", 100].distance
    assert by_steps["ddpm", 10].auc > by_steps["ddpm", 100].auc
    assert choice.deployed.distance <= choice.best.distance + choice.best.distance_se
    assert str(choice.deployed) != "ddpm with 10 steps"
    assert choice.num_samples == 600
    again = measure_samplers(config, network, dataclasses.replace(dataset, test=dataset.val), None)
    assert again == choice, "the test split is not used, and the noise is the same"
