"""Selection of the champion: the finalists are measured anew, one is chosen, and it is exported.

`choose_champion` has each finalist draw fresh samples (`confirmation`), chooses by the rule of `decision`,
and can train the best config for longer (`final_training`). `publish_champion` evaluates the champion once on
the test split, and writes its files to `champion/`, among them decision.json with all that was decided by.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.measured_objective import MeasuredObjective
from diffusion.evaluation.sampler_choice import SamplerChoice
from diffusion.files import replacing
from diffusion.metrics import OBJECTIVE, SAMPLE_PREFIX, VAL_SAMPLE_PREFIX, Objective, with_prefix
from diffusion.registry import OBJECTIVES
from diffusion.training.checkpoints import TrainedModel
from export.to_onnx import ParityError
from workflows.data.load import LoadedData
from workflows.publishing.artifacts import write_model_artifacts
from workflows.publishing.deployed_sampler import with_deployed_sampler
from workflows.publishing.final_metrics import metrics_on_test_split
from workflows.sweep.confirmation import Confirmation
from workflows.sweep.decision import Decision, Finalist, decide, settle
from workflows.sweep.final_training import FinalTraining
from workflows.training.evaluation_files import read_objective
from workflows.training.worker_group import WorkerGroupError

CPU = torch.device("cpu")
DECISION = "decision.json"
_FINAL = "final training"  # name of its model among the finalists


@dataclass(frozen=True)
class Champion:
    """The champion of a sweep.

    Attributes:
        trial_id: ID of the trial whose model or config it is.
        objective: its objective on the validation split.
        update: number of updates that its weights are trained for; None if an earlier version trained it.
        metrics: its metrics: `val/...` from the confirmation, `test/...` computed once on the test split.
        decision: how it was chosen.
        reasons: why it was chosen, in sentences.
        confirmations: confirmed `sample/...` metrics of each finalist, and of the other trials that were
            measured like these, by trial ID.
        data_fingerprint: fingerprint of the data that it was trained and tested on.
        directory: folder of its files.
        samplers: the samplers that were measured for it, or None.
    """

    trial_id: str
    objective: float
    update: int | None
    metrics: dict[str, float]
    decision: Decision
    reasons: tuple[str, ...]
    confirmations: Mapping[str, Mapping[str, float]]
    data_fingerprint: str
    directory: Path
    samplers: SamplerChoice | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen among the finalists, before anything is written.

    Attributes:
        decision: the ranking of the finalists, and how it was decided.
        models: the model of each finalist; that of the best may be the one of the final training.
        confirmed: confirmed `sample/...` metrics of each model, and of other trials measured like these.
        reasons: why the best one was chosen, in sentences.
        confirmations: confirmed metrics of all models, that of the final training under its own name.
        seed_error: standard deviation of an objective over training seeds, by which it was decided.
        final_training: what was decided about the model of the final training, or None without one.
    """

    decision: Decision
    models: Mapping[str, TrainedModel]
    confirmed: Mapping[str, Mapping[str, float]]
    reasons: tuple[str, ...]
    confirmations: Mapping[str, Mapping[str, float]]
    seed_error: float
    final_training: str | None = None


def choose_champion(
    finalists: Mapping[str, Path],
    data: LoadedData,
    provenance: Mapping[str, Any],
    notify: Callable[[str], None],
    final: FinalTraining | None = None,
    *,
    seed_error: float,
    also_measured: Mapping[str, Path] | None = None,
    device: torch.device = CPU,
) -> Choice:
    """Choose the best finalist.

    Args:
        finalists: folders with the files of a trial's model (`workflows.training.evaluation_files`), by trial
            ID.
        data: the data, with all three splits.
        provenance: origin of the model of the final training, see `workflows.publishing.provenance`.
        notify: receives progress messages of one line.
        final: trains the best config for longer; that model is used if it is better by the same rule.
        seed_error: standard deviation of an objective over training seeds.
        also_measured: folders of trials by ID whose samples are measured like those of the finalists, to be
            compared with these; they do not compete.
        device: the device to measure on.

    Raises:
        ValueError: there are no finalists.
    """
    models = {trial_id: TrainedModel.load(folder) for trial_id, folder in finalists.items()}
    placed = data.to(device)
    confirmation = Confirmation(placed, seed_error, notify)

    def confirm(trial_id: str, model: TrainedModel, folder: Path) -> Finalist:
        objective = model.config.metrics.objective
        measured = read_objective(folder, objective, model.provenance["metrics"])
        return confirmation.add(trial_id, model, measured)

    decision = decide(
        [confirm(trial_id, model, finalists[trial_id]) for trial_id, model in models.items()],
        confirmation.compare,
    )
    for trial_id, folder in (also_measured or {}).items():
        confirm(trial_id, TrainedModel.load(folder), folder)
    confirmed = dict(confirmation.metrics)
    best, reasons, verdict = decision.champion, decision.sentences(), None
    longer = _train_longer(models[best], data, provenance, final, notify) if final else None
    if longer is not None:
        challenger = confirmation.add(_FINAL, longer, _measured_objective(longer, placed))
        is_better, verdict = final_training_verdict(decision.finalists[best], challenger, confirmation)
        reasons.append(verdict)
        notify(verdict)
        if is_better:
            models[best], confirmed[best] = longer, confirmation.metrics[_FINAL]
    return Choice(decision, models, confirmed, tuple(reasons), confirmation.metrics, seed_error, verdict)


def publish_champion(
    choice: Choice,
    data: LoadedData,
    directory: Path,
    provenance: Mapping[str, Any],
    notify: Callable[[str], None],
    picked_by_mse: str = "",
    device: torch.device = CPU,
) -> Champion:
    """Evaluate the champion on the test split, export it, and write down how it was chosen.

    If a finalist's export fails, the next one takes its place.

    Args:
        choice: what was chosen.
        data: the data, with all three splits.
        directory: folder for the champion's files; created here.
        provenance: origin of the model, saved with it: see `workflows.publishing.provenance`.
        notify: receives progress messages of one line.
        picked_by_mse: ID of the trial that the mean squared error would have chosen, for the record.
        device: the device to evaluate on.

    Raises:
        ParityError: the ONNX file of no finalist computes what PyTorch computes.
    """
    decision, reasons, placed = choice.decision, list(choice.reasons), data.to(device)
    for trial_id in decision.ranking:
        model = with_deployed_sampler(choice.models[trial_id], placed, notify)
        notify(f"evaluating trial {trial_id} on the test split")
        metrics = {
            **with_prefix(choice.confirmed[trial_id], SAMPLE_PREFIX, VAL_SAMPLE_PREFIX),
            **metrics_on_test_split(model, placed.dataset, placed.features),
        }
        objective, update = model.provenance["metrics"][OBJECTIVE], model.provenance.get("update")
        samplers = SamplerChoice.of(model.provenance)
        why = reasons + (samplers.sentences() if samplers else [])
        origin = {"trial_id": trial_id, "update": update, "metrics": metrics, "decision": why}
        model = dataclasses.replace(model, provenance={**model.provenance, **provenance, **origin})
        try:
            write_model_artifacts(model, data.dataset, data.features, directory, notify)
        except ParityError as error:
            if trial_id == decision.ranking[-1]:
                raise
            notify(f"skipping trial {trial_id}: {error}")
            reasons = [f"chosen since trial {trial_id}, which is better, cannot be exported"]
            continue
        _write_decision(
            directory,
            {
                **decision.to_dict(),
                "champion": trial_id,
                "reasons": why,
                "training_seed_error": choice.seed_error,
                "final_training": choice.final_training,
                "picked_by_mse": picked_by_mse or None,
                "confirmed": choice.confirmations,
            },
        )
        return Champion(
            trial_id,
            objective,
            update,
            metrics,
            decision,
            tuple(why),
            choice.confirmed,
            data.dataset.spec.fingerprint,
            directory,
            samplers,
        )
    raise AssertionError("the last finalist is exported, or its error is raised")


def final_training_verdict(trial: Finalist, longer: Finalist, confirmation: Confirmation) -> tuple[bool, str]:
    """Whether the model of the final training replaces that of the trial whose config it has, and why.

    It does only if it is better by the rule of `decision`, not if the two are equal.
    """
    outcome = settle(trial, longer, confirmation.compare)
    if outcome is None:
        return False, "the model of the final training is not used: it cannot be told apart from the trial's"
    is_kept = outcome.winner == longer.name
    return is_kept, (
        f"the model of the final training is {'' if is_kept else 'not '}used: of the two, "
        f"{'it' if is_kept else 'the trial'} is better, since {outcome.reason}"
    )


def _measured_objective(model: TrainedModel, data: LoadedData) -> MeasuredObjective:
    """The objective of a model whose metrics are known, its examples measured again."""
    objective: Objective = OBJECTIVES[model.config.metrics.objective]
    network = model.to(data.dataset.train.device).network
    _, elbo = Evaluator(model.config, data.dataset, data.features).held_out_losses(network)
    return MeasuredObjective.of(objective, model.provenance["metrics"], elbo.per_example)


def _train_longer(
    model: TrainedModel,
    data: LoadedData,
    provenance: Mapping[str, Any],
    final: FinalTraining,
    notify: Callable[[str], None],
) -> TrainedModel | None:
    """The model of the final training, or None if the training failed."""
    try:
        return final.run(model, data, provenance)
    except WorkerGroupError as error:
        notify(f"warning: the final training failed ({error}); keeping the trial's own model")
        return None


def _write_decision(directory: Path, record: Mapping[str, Any]) -> None:
    """Write decision.json; JSON has no numbers that are not finite, so they become null."""
    tree = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with replacing(directory / DECISION) as part:
        part.write_text(json.dumps(tree, indent=2) + "\n")
