"""Betas, the variances of the forward process's steps, in numpy float64: one function a kind of schedule.

A timestep is 0-based: betas[0] is the paper's beta_1.
"""

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


def linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas that grow linearly from `beta_start` to `beta_end`.

    Args:
        num_train_timesteps: T, at least 1. With T = 1 the only beta is `beta_start`.
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [beta_start, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or betas that are not 0 < beta_start <= beta_end < 1.

    Source: DDPM, arXiv:2006.11239, Section 4 (1e-4 to 0.02 over T = 1000).
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    return np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)


def scaled_linear_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas whose square roots grow linearly, so that they rise more slowly at first than linear ones.

    Args:
        num_train_timesteps: T, at least 1. With T = 1 the only beta is `beta_start`.
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in [beta_start, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or betas that are not 0 < beta_start <= beta_end < 1.

    Source: latent diffusion, arXiv:2112.10752, whose code names it "linear"; "scaled_linear" in
    diffusers. Stable Diffusion goes from 0.00085 to 0.012 over T = 1000.
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    return np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), num_train_timesteps, dtype=np.float64) ** 2


def quadratic_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Another name of `scaled_linear_betas`, with its arguments, result and errors.

    The code of DDIM calls linspace(beta_start^0.5, beta_end^0.5, T)^2 "quad": a quadratic in t, and the
    same formula that Stable Diffusion made known as "scaled linear".

    Source: DDIM, arXiv:2010.02502 (its code).
    """
    return scaled_linear_betas(num_train_timesteps, beta_start, beta_end)


def sigmoid_betas(num_train_timesteps: int, beta_start: float, beta_end: float) -> Float64Array:
    """Betas that rise from `beta_start` to `beta_end` as a logistic curve over [-6, 6].

    Args:
        num_train_timesteps: T, at least 1.
        beta_start: lower end, in (0, 1). The first beta lies sigmoid(-6) = 0.25% of the way above it.
        beta_end: upper end, in [beta_start, 1). The last beta lies as far below it, for T of 2 or more.

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or betas that are not 0 < beta_start <= beta_end < 1.

    Source: GeoDiff, arXiv:2203.02923 (its code).
    """
    _check_beta_range(num_train_timesteps, beta_start, beta_end)
    share = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_train_timesteps, dtype=np.float64)))
    return share * (beta_end - beta_start) + beta_start


def constant_betas(num_train_timesteps: int, terminal_noise: float = 0.9999) -> Float64Array:
    """One beta for every step, so that alphas_cumprod ends at 1 - `terminal_noise`.

    Every beta is 1 - (1 - terminal_noise)^(1/T). Seed 003 prints this formula with a "small constant"
    beta_min in terminal_noise's place and says that q(x_T) then comes close to a uniform
    distribution. Neither can be: the product of T factors (1 - beta_min)^(1/T) is 1 - beta_min
    whatever T is, so a small constant leaves x_T almost free of noise, and the limit of the forward
    process is Gaussian, N(0, I) (DDPM, Section 2). The constant must be close to 1.

    Args:
        num_train_timesteps: T, at least 1.
        terminal_noise: 1 - alphas_cumprod of the last timestep, in (0, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, or terminal_noise outside (0, 1).

    Source: seed 003, Section 3.1, with the constant that it needs.
    """
    _check_num_train_timesteps(num_train_timesteps)
    if not 0.0 < terminal_noise < 1.0:
        raise ValueError(f"terminal_noise {terminal_noise}: need 0 < terminal_noise < 1")
    return np.full(num_train_timesteps, -np.expm1(np.log1p(-terminal_noise) / num_train_timesteps))


def cosine_betas(num_train_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Float64Array:
    """Betas whose alphas_cumprod follows a squared cosine.

    Args:
        num_train_timesteps: T, at least 1.
        s: offset that keeps the first betas from being tiny, at least 0.
        max_beta: upper limit of every beta, in (0, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: T < 1, s < 0 or max_beta outside (0, 1).

    Source: Improved DDPM, arXiv:2102.09672, Eq. 17.
    """
    _check_num_train_timesteps(num_train_timesteps)
    if s < 0.0 or not 0.0 < max_beta < 1.0:
        raise ValueError(f"s {s} and max_beta {max_beta}: need s >= 0 and 0 < max_beta < 1")
    u = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    alpha_bar = np.cos((u + s) / (1.0 + s) * np.pi / 2.0) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def _check_num_train_timesteps(num_train_timesteps: int) -> None:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps {num_train_timesteps}: need at least 1")


def _check_beta_range(num_train_timesteps: int, beta_start: float, beta_end: float) -> None:
    _check_num_train_timesteps(num_train_timesteps)
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"beta_start {beta_start} and beta_end {beta_end}: need 0 < beta_start <= beta_end < 1"
        )
