"""The end of a sweep: the best trials confirmed, the winner exported, drawn and described."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.checkpoints import TrainedModel
from diffusion.data import Dataset
from export.to_onnx import ParityError
from workflows.final_training import FinalTraining
from workflows.group import GroupFailed
from workflows.product import figures_on_test, sample_metrics, write_product

_CONFIRMATION_SEED = 1_000_001  # which no trial was judged by


@dataclass(frozen=True)
class Champion:
    """The winner of a sweep.

    Attributes:
        trial_id: of the trial it comes from.
        metrics: its figures: `val/...` of the confirmation, `test/...` taken once.
        confirmations: `sample/distance` of each finalist, by trial id.
        data_fingerprint: of the data it was trained and tested on.
        directory: the champion's folder.
    """

    trial_id: str
    metrics: dict[str, float]
    confirmations: dict[str, float]
    data_fingerprint: str
    directory: Path


def crown(
    finalists: Mapping[str, Path],
    dataset: Dataset,
    directory: Path,
    provenance: Mapping[str, Any],
    say: Callable[[str], None],
    final: FinalTraining | None = None,
) -> Champion:
    """Confirm the finalists on the validation split, take the winner's test figures, export it.

    A finalist that cannot be exported leaves its place to the next.

    Args:
        finalists: folders with config.json and model.safetensors by trial id.
        dataset: all three splits.
        directory: the champion's folder, made here.
        provenance: kept with the model: run id, revision of the code.
        say: told what is being done.
        final: trains the winner's config anew; what comes of it is handed over if it is confirmed as better.

    Raises:
        ParityError: no finalist's ONNX file would compute what PyTorch computes.
    """
    models = {trial_id: TrainedModel.load(folder) for trial_id, folder in finalists.items()}
    confirmed = {}
    for number, (trial_id, model) in enumerate(models.items(), start=1):
        say(f"confirming trial {trial_id} with fresh seeds ({number}/{len(models)})")
        confirmed[trial_id] = sample_metrics(model, dataset, dataset.val[:], _CONFIRMATION_SEED)
    distances = {trial_id: metrics["sample/distance"] for trial_id, metrics in confirmed.items()}
    ranked = sorted(models, key=lambda trial_id: distances[trial_id])
    if final is not None:
        best = ranked[0]
        longer = _trained_longer(models[best], dataset, provenance, final, say)
        if longer is not None and longer[1]["sample/distance"] < distances[best]:
            models[best], confirmed[best] = longer
        elif longer is not None:
            found = longer[1]["sample/distance"]
            say(
                f"trial {best} itself is kept: its distance is {distances[best]:.4g}, that of the longer "
                f"training {found:.4g}"
            )
    for winner in ranked:
        say(f"measuring trial {winner} on the test split, exporting and drawing it")
        model = models[winner]
        metrics = {
            **{name.replace("sample/", "val/sample_"): value for name, value in confirmed[winner].items()},
            **figures_on_test(model, dataset),
        }
        model = dataclasses.replace(model, provenance={**provenance, "trial_id": winner, "metrics": metrics})
        try:
            write_product(model, dataset, directory)
        except ParityError as error:
            if winner == ranked[-1]:
                raise
            say(f"trial {winner} is passed over: {error}")
            continue
        return Champion(winner, metrics, distances, dataset.spec.fingerprint, directory)
    raise ValueError("there are no finalists")


def _trained_longer(
    model: TrainedModel,
    dataset: Dataset,
    provenance: Mapping[str, Any],
    final: FinalTraining,
    say: Callable[[str], None],
) -> tuple[TrainedModel, dict[str, float]] | None:
    """The winner trained anew, and its confirmation; None where that failed."""
    try:
        longer = final.run(model, dataset, provenance)
    except GroupFailed as error:
        say(f"warning: the final training failed ({error}); the trial's own model is kept")
        return None
    return longer, sample_metrics(longer, dataset, dataset.val[:], _CONFIRMATION_SEED)
