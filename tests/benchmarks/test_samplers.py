"""The table of samplers: what a row compares."""

from dataclasses import asdict, replace

from benchmarks import samplers
from diffusion.config import Config
from diffusion.evaluation.sampler_choice import MeasuredSampler, choose_sampler


def test_a_row_shows_the_truth_of_the_choice_the_best_the_fast_and_the_default():
    """The truths are in the order of the measured samplers, which is by network evaluations."""
    measured = [
        MeasuredSampler("ddpm", 100, 100, 0.20, 0.02, 0.6, 0.01),
        MeasuredSampler("dpmpp_2m", 20, 20, 0.30, 0.02, 0.7, 0.01),
        MeasuredSampler("ddim", 50, 50, 0.21, 0.02, 0.6, 0.01),
        MeasuredSampler("ddim", 200, 200, 0.25, 0.02, 0.6, 0.01),
    ]
    content = {
        "choice": choose_sampler(measured, 9).to_dict(),
        "truths": [[0.72, 3.0], [0.61, 2.5], [0.62, 2.0], [0.60, 1.0]],
        "config": asdict(Config()),
    }
    assert samplers.row("digits", -1, content) == (
        "| digits | preset | ddim 50: 0.61 / 2.5 | ddim 200: 0.6 / 1 | dpmpp_2m 20: 0.72 / 3 "
        "| ddpm 100: 0.62 / 2 |"
    )


def test_a_default_with_more_steps_than_the_schedule_is_that_of_all_steps():
    config = Config()
    config = replace(config, schedule=replace(config.schedule, num_train_timesteps=50))
    measured = [MeasuredSampler("ddpm", 50, 50, 0.2, 0.02, 0.6, 0.01)]
    content = {
        "choice": choose_sampler(measured, 9).to_dict(),
        "truths": [[0.6, 1.0]],
        "config": asdict(config),
    }
    assert samplers.row("rings", 5, content) == (
        "| rings | 5 | ddpm 50: 0.6 | ddpm 50: 0.6 |  | ddpm 50: 0.6 |"
    )
