"""Quality per network evaluation: our 20 steps beside diffusers' samplers, on the same weights.

An MLP of the digits is trained as in a sweep's trial (T = 1000). Its samples by 20 steps of DPM-
Solver++(2M), as `train.py` and sampler.onnx draw them, and by diffusers' DDIMScheduler with 50 steps and
DDPMScheduler with all 1,000 are compared with the training and validation examples: by the kernel distance
and by how well a classifier tells them apart (`auc`, 0.5: not at all), lower is better. diffusers'
schedulers clip to the largest value of the normalised data. Each repeat has noise of its own; ratios of
distances near 0 say little, so the table has the differences and their standard errors over the repeats.
"""

import math
import statistics
from typing import Any

from benchmarks.comparison import Options, Report
from benchmarks.table import Unit, row

TITLE = "Quality per network evaluation"
WORK = "20 steps of DPM-Solver++(2M), digits"
WORKS = (WORK,)
PEERS = {
    "diffusers DDIM, 50 steps": ("DDIMScheduler", 50),
    "diffusers DDPM, 1000 steps": ("DDPMScheduler", 1000),
}
UNITS = {"distance": "kernel distance", "auc": "AUC"}
NUM_UPDATES, NUM_SAMPLES, STEPS, T = 4000, 1000, 20, 1000


def run(options: Options) -> Report:
    import torch

    from diffusion.data.dataset import load_dataset
    from diffusion.evaluation.evaluator import Evaluator
    from diffusion.evaluation.sample_metrics import SampleMetrics
    from diffusion.presets import preset
    from diffusion.training.loop import Training

    values = {"training.num_updates": NUM_UPDATES, "training.num_evaluations": 1}
    ours = {"sampler.name": "dpmpp_2m", "sampler.num_steps": STEPS, "schedule.num_train_timesteps": T}
    config = preset("digits").with_values(values | ours)
    dataset, report = load_dataset(config.data), Report()
    training = Training(config, dataset, lambda result: None)
    training.run()
    network, judge = training.model.network, SampleMetrics(dataset, dataset.val[:])
    evaluator = Evaluator(config, dataset)
    found: dict[str, list[dict[str, float]]] = {"ours": []} | {peer: [] for peer in PEERS}
    for seed in range(options.repeats):
        drawn = {"ours": evaluator.samples(network, num_samples=NUM_SAMPLES, seed=seed)}
        for peer, (scheduler, num_steps) in PEERS.items():
            torch.manual_seed(seed)
            drawn[peer] = by_diffusers(scheduler, num_steps, network, dataset.spec)
        for name, samples in drawn.items():
            found[name].append({key: each.value for key, each in judge.deciding(samples).items()})
            print(f"  {seed + 1}/{options.repeats} {name}: {found[name][-1]}", flush=True)
    report.lines += ["", "| | | ours | peer's | difference | standard error |", "|---" * 6 + "|"]
    for peer in PEERS:
        for key, unit in UNITS.items():
            own, theirs = ([each[key] for each in found[name]] for name in ("ours", peer))
            report.rows.append(row(WORK, peer, Unit(unit), own, theirs, goal="as good within error"))
            differences = [a - b for a, b in zip(own, theirs, strict=True)]
            spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
            cells = [statistics.mean(own), statistics.mean(theirs), statistics.mean(differences)]
            shown = [f"{each:.4f}" for each in (*cells, spread / math.sqrt(len(differences)))]
            report.lines.append(f"| {peer} | {unit} | {' | '.join(shown)} |")
    return report


def by_diffusers(scheduler: str, num_steps: int, network: Any, spec: Any) -> Any:
    """Samples by a scheduler of diffusers as it comes, but for the interval that it clips to."""
    import diffusers
    import torch

    made = getattr(diffusers, scheduler)(num_train_timesteps=T, clip_sample_range=max(map(abs, spec.clip)))
    made.set_timesteps(num_steps)
    x = torch.randn(NUM_SAMPLES, *spec.shape)
    with torch.no_grad():
        for t in made.timesteps:
            x = made.step(network(x, t.expand(NUM_SAMPLES)), t, x).prev_sample
    return x
