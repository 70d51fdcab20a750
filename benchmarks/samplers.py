"""Does the measured choice of sampler and steps hold on examples that nobody has seen?

    python -m benchmarks.samplers --folder /tmp/samplers --mnist ~/mnist10k    # an hour on two cores
    python -m benchmarks.samplers --folder /tmp/samplers --data heart rings

Trains configs of `benchmarks.judgement` on its laws and pictures, and lets each model choose its sampler
(`diffusion.evaluation.sampler_choice`), which sees training and validation examples only. Then compares the
samples of every sampler at every number of steps with fresh examples, by yardsticks that the choice does not
use. Whatever is already in the folder is kept. Writes benchmarks/results/samplers.md.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.judgement import TRUTH_SEED, base_config, draw_values, truth_of
from benchmarks.judgement_data import NAMES, POINTS, prepare
from benchmarks.parallel import run_jobs
from diffusion.data.dataset import load_dataset
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features import fit_features
from diffusion.evaluation.sampler_choice import SamplerChoice, choose_sampler, measure_samplers
from diffusion.training.loop import train

RESULTS = Path(__file__).parent / "results" / "samplers.md"
CONFIGS = (-1, 1, 5)  # the preset's own config, and two random ones of the search space
TRUTHS = {True: ("trees",), False: ("network", "frechet")}  # of points and of pictures


def measure(name: str, number: int, folder: Path) -> None:
    """Train a config, choose its sampler and judge every choice, unless the result is in the folder."""
    result = folder / f"{name}-{number}.json"
    if result.exists():
        return
    torch.set_num_threads(1)
    data = prepare(name, folder / "data", None)
    config = base_config(name, data.path, 1.0)
    if number >= 0:
        config = config.with_values(draw_values(name in POINTS, number + 1)[number])
    dataset = load_dataset(config.data)
    features = fit_features(dataset, "auto")
    model = train(config, dataset)
    choice = measure_samplers(model.config, model.network, dataset, features)
    truth, truths = truth_of(data), []
    for each in choice.measured:
        values = {"sampler.name": each.name, "sampler.num_steps": each.num_steps}
        evaluator = Evaluator(model.config.with_values(values), dataset)
        drawn = evaluator.samples(model.network, num_samples=len(data.fresh), seed=TRUTH_SEED)
        found = truth(dataset.raw(drawn))
        truths.append([found[each] for each in TRUTHS[name in POINTS]])
    result.write_text(json.dumps({"choice": choice.to_dict(), "truths": truths, "config": asdict(config)}))


def row(name: str, number: int, content: dict[str, Any]) -> str:
    """A line of the table: the choice, and the truths of it, of the best by truth, and of two others."""
    recorded = SamplerChoice.from_dict(content["choice"])
    measured, truths = recorded.measured, np.array(content["truths"])[:, : len(TRUTHS[name in POINTS])]
    choice = choose_sampler(measured, recorded.num_samples)  # by today's rule
    own = content["config"]["sampler"]
    index = {(each.name, each.num_steps): place for place, each in enumerate(measured)}
    steps = min(own["num_steps"], content["config"]["schedule"]["num_train_timesteps"])
    default = index[own["name"], steps]
    best = int(np.argmin(truths[:, 0]))

    def cell(place: int) -> str:
        each = measured[place]
        figures = " / ".join(f"{value:.3g}" for value in truths[place])
        return f"{each.name} {each.num_steps}: {figures}"

    deployed = measured.index(choice.deployed)
    fast = "" if choice.fast is None else cell(measured.index(choice.fast))
    label = "preset" if number < 0 else str(number)
    return f"| {name} | {label} | {cell(deployed)} | {cell(best)} | {fast} | {cell(default)} |"


def write_report(folder: Path) -> Path:
    """Write the table of everything that is in the folder."""
    found = [
        (name, number, json.loads(path.read_text()))
        for name in NAMES
        for number in CONFIGS
        if (path := folder / f"{name}-{number}.json").exists()
    ]
    rows = "\n".join(row(*each) for each in found)
    RESULTS.write_text(
        "# Samplers and steps, chosen and judged\n\n"
        "Written by `python -m benchmarks.samplers`. Each model chose its sampler by `distance` and `auc`\n"
        "on training and validation examples. The figures are of examples that it has not seen, by\n"
        "yardsticks that the choice does not use (benchmarks/judgement_truth.py), lower is better:\n"
        f"{', '.join(TRUTHS[True])} for points (0.5: samples cannot be told from data),\n"
        f"{' / '.join(TRUTHS[False])} for pictures. `best` has the smallest first figure of all.\n\n"
        "| data | config | deployed | best | fast | default |\n|---|---|---|---|---|---|\n"
        f"{rows}\n"
    )
    return RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps data and results")
    parser.add_argument("--data", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--mnist", type=Path, help="folder of digits, for mnist and colours")
    parser.add_argument("--processes", type=int, help="default: one per core")
    options = parser.parse_args()
    for name in options.data:
        prepare(name, options.folder / "data", options.mnist)
    jobs = [(name, number, options.folder) for number in CONFIGS for name in options.data]
    run_jobs(measure, jobs, options.processes, lambda *job: write_report(options.folder))
    print(RESULTS)


if __name__ == "__main__":
    main()
