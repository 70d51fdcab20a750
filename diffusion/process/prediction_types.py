"""What a network's output means: x_0 and epsilon as linear functions of x_t and the output.

Everything is numpy float64; `diffusion.process.forward` has the conversions of tensors.
"""

from typing import Literal

import numpy as np

from diffusion.process.schedules import Float64Array

PredictionType = Literal["epsilon", "sample", "v_prediction"]


def check_determines_x_0(prediction_type: PredictionType, alphas_cumprod_t: float) -> None:
    """Check that the network's output determines x_0 at a noise level.

    Raises:
        ValueError: epsilon is predicted and alphas_cumprod is 0: x_t then says nothing about x_0.
    """
    if prediction_type == "epsilon" and alphas_cumprod_t == 0.0:
        raise ValueError(
            "alphas_cumprod reaches 0, where epsilon does not determine x_0: "
            "use prediction_type 'v_prediction' or 'sample', or a gentler schedule"
        )


def x0_coefficients(
    prediction_type: PredictionType, alphas_cumprod_t: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Coefficients of x0 = a x_t + b out.

    Args:
        prediction_type: meaning of the output.
        alphas_cumprod_t: [steps], positive for "epsilon".

    Source: as for `diffusion.process.forward.to_x_0`.
    """
    if prediction_type == "epsilon":
        return 1.0 / np.sqrt(alphas_cumprod_t), -np.sqrt((1.0 - alphas_cumprod_t) / alphas_cumprod_t)
    if prediction_type == "sample":
        return np.zeros_like(alphas_cumprod_t), np.ones_like(alphas_cumprod_t)
    return np.sqrt(alphas_cumprod_t), -np.sqrt(1.0 - alphas_cumprod_t)


def epsilon_coefficients(
    prediction_type: PredictionType, alphas_cumprod_t: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Coefficients of epsilon = a x_t + b out; arguments and source as for `x0_coefficients`."""
    if prediction_type == "epsilon":
        return np.zeros_like(alphas_cumprod_t), np.ones_like(alphas_cumprod_t)
    if prediction_type == "sample":
        return 1.0 / np.sqrt(1.0 - alphas_cumprod_t), -np.sqrt(alphas_cumprod_t / (1.0 - alphas_cumprod_t))
    return np.sqrt(1.0 - alphas_cumprod_t), np.sqrt(alphas_cumprod_t)
