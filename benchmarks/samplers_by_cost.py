"""What do samples cost? Every sampler at several numbers of network evaluations, on trained models.

    python -m benchmarks.samplers_by_cost --folder /tmp/by-cost --mnist ~/mnist10k   # 30 minutes on one core
    python -m benchmarks.samplers_by_cost --folder /tmp/by-cost --data heart

Trains the preset's model of each data set of `benchmarks.judgement_data` for a part of its updates, and
compares its samples with the training and validation examples, as a sweep does when it chooses the sampler
(`diffusion.evaluation.sampler_choice`), but with every sampler of the registry and with two spacings. All
start from the same noise. Whatever is already in the folder is kept. Writes
benchmarks/results/samplers_by_cost.md.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.judgement import base_config
from benchmarks.judgement_data import prepare
from diffusion.data.dataset import Dataset, load_dataset
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features import fit_features
from diffusion.evaluation.sample_metrics import SampleMetrics
from diffusion.evaluation.sampler_choice import samplers_to_measure
from diffusion.metrics import AUC, DISTANCE
from diffusion.registry import SAMPLERS
from diffusion.training.checkpoints import TrainedModel
from diffusion.training.loop import train

RESULTS = Path(__file__).parent / "results" / "samplers_by_cost.md"
# Fraction of the preset's updates, and number of samples.
SETTINGS = {"heart": (0.5, 1000), "digits": (0.5, 1000), "mnist": (1.0, 500)}
SPACINGS = ("logsnr", "karras")
MOST_EVALUATIONS = 101
SEED = 5


def trained_model(name: str, folder: Path, mnist: Path | None) -> tuple[TrainedModel, Dataset]:
    """The model of a data set, from the folder if it is there."""
    config = base_config(name, prepare(name, folder / "data", mnist).path, SETTINGS[name][0])
    dataset = load_dataset(config.data)
    path = folder / name
    if not path.exists():
        train(config, dataset).save(path)
    return TrainedModel.load(path), dataset


def measure(name: str, folder: Path, mnist: Path | None) -> dict[str, Any]:
    """Metrics of every sampler, by spacing, name and number of network evaluations."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    model, dataset = trained_model(name, folder, mnist)
    features = fit_features(dataset, "auto")
    metrics = SampleMetrics(dataset, dataset.val[:], features)
    for each in samplers_to_measure(model.config, dataset.spec.kind, list(SAMPLERS)):
        for spacing in SPACINGS:
            config = replace(model.config, sampler=replace(each, spacing=spacing))
            evaluator = Evaluator(config, dataset, features)
            key = f"{spacing} {each.name} {evaluator.network_evaluations}"
            if key in found or evaluator.network_evaluations > MOST_EVALUATIONS:
                continue
            drawn = evaluator.samples(model.network, num_samples=SETTINGS[name][1], seed=SEED)
            values = metrics.deciding(drawn)
            found[key] = {
                metric: (value.value, value.standard_error)
                for metric, value in values.items()
                if metric in (DISTANCE, AUC)
            }
            path.write_text(json.dumps(found))
    return found


def table(found: dict[str, Any]) -> list[str]:
    """Lines of a table: AUC and distance by sampler and spacing, a column for each number of evaluations."""
    keys = [(spacing, name, int(cost)) for spacing, name, cost in map(str.split, found)]
    # A two-stage sampler has an odd number of evaluations, one less than asked for, as the column says.
    columns = sorted({cost + cost % 2 for _, _, cost in keys})
    rows: dict[tuple[str, str], dict[int, str]] = {}
    errors: dict[int, list[float]] = {}
    for spacing, name, cost in keys:
        values = found[f"{spacing} {name} {cost}"]
        (distance, _), (auc, error) = values[DISTANCE], values[AUC]
        column = cost + cost % 2
        rows.setdefault((name, spacing), {})[column] = f"{auc:.3f} / {distance:.3g}"
        errors.setdefault(column, []).append(error)
    lines = [
        f"| sampler | spacing | {' | '.join(map(str, columns))} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for name in SAMPLERS:
        for spacing in SPACINGS:
            cells = [rows.get((name, spacing), {}).get(column, "") for column in columns]
            if any(cells):
                lines.append(f"| {name} | {spacing} | {' | '.join(cells)} |")
    error = max(map(max, errors.values()))
    return [*lines, "", f"Standard error of an AUC: at most {error:.3f}."]


def write_report(folder: Path) -> None:
    """Write the tables of everything that is in the folder."""
    lines = [
        "# Samplers by cost",
        "",
        "Written by `python -m benchmarks.samplers_by_cost`: AUC / distance (docs/judging.md, lower is",
        "better; an AUC of 0.5 cannot be told from the data) of samples to training and validation examples,",
        "by network evaluations for each sample. A step of heun and heun_churn has two, so they have",
        "one less than the column says. eta is the sampler's own: 0 in ddim, 0.25 in heun_churn.",
    ]
    for name, (fraction, num_samples) in SETTINGS.items():
        path = folder / f"{name}.json"
        if path.exists():
            updates = TrainedModel.load(folder / name).config.training.num_updates
            lines += [
                "",
                f"## {name}: {updates:,} updates ({fraction:g} of the preset's), {num_samples} samples",
                "",
            ]
            lines += table(json.loads(path.read_text()))
    RESULTS.write_text("\n".join(lines) + "\n")
    print(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps data, models and results")
    parser.add_argument("--data", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--mnist", type=Path, help="folder of digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.data:
        measure(name, options.folder, options.mnist)
        write_report(options.folder)


if __name__ == "__main__":
    main()
