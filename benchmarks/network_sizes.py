"""Does a wider or deeper network pay for itself within a trial's budget?

    python -m benchmarks.network_sizes --folder /tmp/sizes    # half an hour on two cores

Trains the preset's config with networks of several sizes for the updates of a sweep's trial, and compares
the objective, the metrics that choose the champion, and a yardstick on fresh examples that no sweep has
(`benchmarks.judgement_truth`). Whatever is already in the folder is kept. Writes
benchmarks/results/network_sizes.md.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.judgement import TRUTH_SEED, base_config, train, truth_of
from benchmarks.judgement_data import POINTS, prepare
from benchmarks.parallel import run_jobs
from diffusion.data.dataset import load_dataset
from diffusion.evaluation.evaluator import Evaluator
from diffusion.metrics import OBJECTIVE, SAMPLE_AUC, SAMPLE_DISTANCE
from diffusion.training.checkpoints import TrainedModel

RESULTS = Path(__file__).parent / "results" / "network_sizes.md"
SIZES = ((64, 3), (128, 3), (256, 3), (64, 6), (128, 6))  # width and number of blocks; the first is default


def measure(name: str, size: tuple[int, int], folder: Path) -> None:
    """Train a network of a size and judge it, unless the result is in the folder."""
    result = folder / f"{name}-{size[0]}-{size[1]}.json"
    if result.exists():
        return
    torch.set_num_threads(1)
    data = prepare(name, folder / "data", None)
    values = {"network.hidden_size": size[0], "network.num_blocks": size[1]}
    trial, config = folder / result.stem, base_config(name, data.path, 1.0).with_values(values)
    train(config, trial)
    model, dataset = TrainedModel.load(trial), load_dataset(config.data)
    evaluator = Evaluator(config, dataset)
    drawn = evaluator.samples(model.network, num_samples=len(data.fresh), seed=TRUTH_SEED)
    tree = json.loads((trial / "history.json").read_text())
    last = tree["history"][-1]
    row = {
        "parameters": sum(weight.numel() for weight in model.network.parameters()),
        "seconds": tree["seconds"],
        **{key: last[key] for key in (OBJECTIVE, SAMPLE_DISTANCE, SAMPLE_AUC)},
        "trees": truth_of(data)(dataset.raw(drawn))["trees"],
    }
    result.write_text(json.dumps(row))


def write_report(folder: Path) -> Path:
    """Write the table of everything that is in the folder."""
    lines = [
        "# Width and depth of the MLP for points",
        "",
        "Written by `python -m benchmarks.network_sizes`: the preset's config with networks of several",
        "sizes, trained for the updates of a sweep's trial on one core, evaluation included in the seconds.",
        "`trees`: how well randomised trees tell 5,000 samples from fresh examples (0.5: not at all).",
        "Objective, distance, AUC and trees: lower is better.",
        "",
        "| data | width | blocks | parameters | seconds | objective | distance | AUC | trees |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in POINTS:
        for width, blocks in SIZES:
            path = folder / f"{name}-{width}-{blocks}.json"
            if path.exists():
                row = json.loads(path.read_text())
                lines.append(
                    f"| {name} | {width} | {blocks} | {row['parameters']} | {row['seconds']:.0f} "
                    f"| {row[OBJECTIVE]:.4f} | {row[SAMPLE_DISTANCE]:.4f} | {row[SAMPLE_AUC]:.3f} "
                    f"| {row['trees']:.3f} |"
                )
    RESULTS.write_text("\n".join(lines) + "\n")
    return RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps data and results")
    parser.add_argument("--data", nargs="+", choices=list(POINTS), default=["heart", "rings", "checkerboard"])
    parser.add_argument("--processes", type=int, help="default: one per core")
    options = parser.parse_args()
    for name in options.data:
        prepare(name, options.folder / "data", None)
    jobs = [(name, size, options.folder) for size in SIZES for name in options.data]
    run_jobs(measure, jobs, options.processes, lambda *job: write_report(options.folder))
    print(RESULTS)


if __name__ == "__main__":
    main()
