"""What the tests of samplers share: a schedule, and the settings that they go through."""

from typing import get_args

import pytest

from diffusion.process.prediction_types import PredictionType
from diffusion.process.schedules import NoiseSchedule, Spacing, linear_betas

PREDICTION_TYPES, SPACINGS = get_args(PredictionType), get_args(Spacing)
NUM_TRAIN_TIMESTEPS = 60
CLIP = (-0.8, 0.8)


@pytest.fixture(name="schedule")
def _schedule():
    return NoiseSchedule(linear_betas(NUM_TRAIN_TIMESTEPS, 1e-3, 0.2))
