"""Which table of coefficients a call of the exported sampler uses. Loads no torch."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from diffusion.errors import InputError
from diffusion.process.samplers import (
    SamplerTable,
    sampler_table,
    samplers_with_eta,
    with_learned_variance,
)
from diffusion.process.schedules import Spacing
from diffusion.registry import SAMPLERS
from export.contract import FAST, SamplerSpec
from export.values import real_number, whole_number


def choose_table(
    spec: SamplerSpec,
    *,
    sampler: str | None = None,
    num_steps: int | None = None,
    eta: float | None = None,
    spacing: Spacing | None = None,
) -> SamplerTable:
    """Compute the table of a sampler for a file; None takes the file's value.

    Args:
        spec: the file's metadata.
        sampler, num_steps, eta, spacing: as for `export.sampler.Sampler.sample`.

    Raises:
        InputError: a value is out of range, or a name is unknown.
    """
    if num_steps is not None:
        num_steps = whole_number("num_steps", num_steps)
    if eta is not None:
        eta = real_number("eta", eta)
    for argument, text in (("sampler", sampler), ("spacing", spacing)):
        if not isinstance(text, str | None):
            raise InputError(f"{argument} {text!r}: give a name")
    if sampler is None and num_steps is None and eta is None and spacing is None:
        return spec.table
    own = spec.sampler
    if sampler == FAST:
        own, sampler = {**own, **_fast_sampler(spec)}, None
    name = sampler or own["name"]
    if eta and name in SAMPLERS and not SAMPLERS[name].uses_eta:
        users = samplers_with_eta()
        raise InputError(
            f"eta {eta:g}: only the samplers {' and '.join(users)} use it, not {name}; choose "
            f"{' or '.join(users)}, or leave eta out"
        )
    if eta is None and name == spec.sampler["name"]:
        eta = own["eta"]
    learned = spec.learned_variance
    build = partial(
        sampler_table,
        spec.noise_schedule,
        name,
        own["num_steps"] if num_steps is None else num_steps,
        prediction_type=spec.prediction_type,
        eta=eta,
        spacing=spacing or own["spacing"],
        clip=own["clip"],
    )
    try:
        table = build(variance="beta_tilde" if learned else own["variance"])
        if learned and name == "ddpm":
            table = with_learned_variance(table, build(variance="beta"))
    except ValueError as error:
        raise InputError(str(error)) from error
    if spec.noise_level is None:
        return table
    noise_levels = spec.noise_levels(table.timesteps)
    if not np.isfinite(noise_levels).all():
        raise InputError(
            f"sampler {name}: at its first timestep {spec.noise_level} is infinite; "
            "leave sampler, num_steps, eta and spacing out"
        )
    return replace(table, timesteps=np.zeros(0, dtype=np.int64), noise_levels=noise_levels)


def _fast_sampler(spec: SamplerSpec) -> dict[str, Any]:
    fast: dict[str, Any] | None = spec.sampler.get(FAST)
    if fast is None:
        raise InputError(
            f"sampler {FAST}: no fast sampler was measured for this file; choose one of "
            f"{', '.join(SAMPLERS)}, and a number of steps"
        )
    return fast
