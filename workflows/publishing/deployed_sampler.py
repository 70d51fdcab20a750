"""The sampler that a finished model is deployed with: chosen by measurement, if the config asks for it."""

import math
from collections.abc import Callable
from dataclasses import replace

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from diffusion.evaluation.sampler_choice import PROVENANCE, SamplerChoice, measure_samplers
from diffusion.metrics import AUC, DISTANCE, SAMPLER_PREFIX
from diffusion.registry import SAMPLERS
from diffusion.training.checkpoints import TrainedModel
from workflows.data.load import LoadedData


def with_deployed_sampler(
    model: TrainedModel, data: LoadedData, notify: Callable[[str], None]
) -> TrainedModel:
    """The model with the sampler that was chosen for it, and what was measured in its provenance.

    Args:
        model: a finished model; unless its `metrics.choose_sampler` is set, it is returned as it is.
        data: the data that it was trained on; the test split is not used.
        notify: receives progress messages of one line.
    """
    if not model.config.metrics.choose_sampler:
        return model
    choice = measure_samplers(model.config, model.network, data.dataset, data.features, notify)
    chosen = choice.deployed
    values: dict[str, str | float] = {"sampler.name": chosen.name, "sampler.num_steps": chosen.num_steps}
    if not SAMPLERS[chosen.name].uses_eta:
        values["sampler.eta"] = 0.0
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


def sampler_figure(choice: SamplerChoice) -> Figure:
    """Plot of `distance` and `auc` by network evaluations, a line for each sampler."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, (DISTANCE, AUC), strict=True):
        for name in dict.fromkeys(each.name for each in choice.measured):
            line = [each for each in choice.measured if each.name == name]
            axes.errorbar(
                [each.network_evaluations for each in line],
                [getattr(each, metric) for each in line],
                [getattr(each, f"{metric}_se") for each in line],
                marker=".",
                label=name,
            )
        for chosen, label, marker in ((choice.fast, "fast", "s"), (choice.deployed, "deployed", "o")):
            if chosen is not None:
                place = chosen.network_evaluations, getattr(chosen, metric)
                axes.plot(*place, marker, markersize=11, fillstyle="none", color="black", label=label)
        axes.set(xlabel="network evaluations", ylabel=metric, xscale="log")
        evaluations = sorted({each.network_evaluations for each in choice.measured})
        axes.set_xticks(evaluations, [str(number) for number in evaluations])
        axes.xaxis.set_minor_locator(NullLocator())
    panels[0].legend()
    return figure


def sampler_table(choice: SamplerChoice) -> str:
    """The measured samplers as a table in Markdown."""
    rows = "\n".join(
        f"| {each.name} | {each.num_steps} | {each.network_evaluations} "
        f"| {each.distance:.4g} ± {each.distance_se:.2g} | {each.auc:.3f} ± {each.auc_se:.2g} |"
        for each in choice.measured
    )
    return f"| sampler | steps | network evaluations | distance | AUC |\n|---|---|---|---|---|\n{rows}"
