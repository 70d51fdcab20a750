"""The sampler that a finished model is deployed with: chosen by measurement, if the config asks for it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffusion.evaluation.sampler_choice import PROVENANCE, SamplerChoice, measure_samplers
from diffusion.metrics import AUC, DISTANCE, SAMPLER_PREFIX
from diffusion.training.checkpoints import TrainedModel
from workflows.data.load import LoadedData


def with_deployed_sampler(
    model: TrainedModel, data: LoadedData, notify: Callable[[str], None]
) -> TrainedModel:
    """The model with the sampler that was chosen for it, and what was measured in its provenance.

    Args:
        model: a finished model; unless its `metrics.choose_sampler` is set, it is returned as it is.
        data: the data that it was trained on, on the device to measure on; the test split is not used.
        notify: receives progress messages of one line.
    """
    if not model.config.metrics.choose_sampler:
        return model
    network = model.to(data.dataset.train.device).network
    choice = measure_samplers(model.config, network, data.dataset, data.features, notify)
    chosen = choice.deployed
    values: dict[str, Any] = {"sampler.name": chosen.name, "sampler.num_steps": chosen.num_steps}
    if chosen.name != model.config.sampler.name:
        values["sampler.eta"] = None  # the sampler's own
    provenance = {**model.provenance, PROVENANCE: choice.to_dict()}
    return replace(model, config=model.config.with_values(values), provenance=provenance)


def sampler_curves(choice: SamplerChoice | None) -> dict[int, dict[str, float]]:
    """Metrics `sampler/NAME_distance` and `sampler/NAME_auc` by network evaluations, for a tracker."""
    curves: dict[int, dict[str, float]] = {}
    for each in choice.measured if choice else ():
        values = {DISTANCE: each.distance, AUC: each.auc}
        if not all(map(math.isfinite, values.values())):
            continue
        point = {f"{SAMPLER_PREFIX}{each.name}_{metric}": value for metric, value in values.items()}
        curves.setdefault(each.network_evaluations, {}).update(point)
    return curves


def sampler_table(choice: SamplerChoice) -> str:
    """The measured samplers as a table in Markdown."""
    rows = "\n".join(
        f"| {each.name} | {each.num_steps} | {each.network_evaluations} "
        f"| {each.distance:.4g} ± {each.distance_se:.2g} | {each.auc:.3f} ± {each.auc_se:.2g} |"
        for each in choice.measured
    )
    return f"| sampler | steps | network evaluations | distance | AUC |\n|---|---|---|---|---|\n{rows}"
