"""Is a cascade better than a single model of equal training time?

    python -m benchmarks.cascade --data ~/mnist --folder /tmp/cascade    # images of 28 pixels; 15 minutes

Trains the preset's U-Net of the full images, and a cascade: the preset's model of the images reduced to a
quarter, and one from these to the full size, both together for as many seconds of one core. Draws equally
many samples of each from the exported files, with several strengths of the noise between the models of the
cascade, and judges them as `ray-ddpm evaluate` does. What is already in the folder is kept. Writes
benchmarks/results/cascade.md and its picture.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.budget import train_for
from benchmarks.table import hardware, versions
from diffusion.config import Config, DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.data.sources import open_source
from diffusion.evaluation.features import fit_features
from diffusion.plots import rows_of_images
from diffusion.presets import source_preset
from export.cascade import Cascade
from export.sampler import Sampler
from export.to_onnx import onnx_model
from export.torch_sampler import TorchSampler
from workflows.evaluation.candidates import Candidate
from workflows.evaluation.judge import judge

RESULTS = Path(__file__).parent / "results"
SIDE, LOW_SIDE = 28, 7
FRACTIONS = {"single": 1.0, "low": 0.2, "second": 0.8}  # of the training time
NOISE_LEVELS = (0.0, 0.1, 0.3)
NUM_SAMPLES, NUM_SHOWN, COLUMNS = 300, 24, 12


def config_of(name: str, data: Path) -> Config:
    """The preset's config of a model, as train.py has it."""
    size: dict[str, Any] = {
        "single": {"image_size": SIDE},
        "low": {"image_size": LOW_SIDE},
        "second": {"super_resolution": f"{LOW_SIDE}:{SIDE}"},
    }[name]
    return source_preset(open_source(DataConfig(name=str(data.absolute()), **size)), alone=True)


def train(name: str, data: Path, folder: Path, seconds: float) -> None:
    """Train and export a model, unless the folder has it."""
    facts = folder / f"{name}.json"
    if facts.exists():
        return
    torch.set_num_threads(1)
    config = config_of(name, data)
    model, taken = train_for(config, load_dataset(config.data), FRACTIONS[name] * seconds)
    model.save(folder / name)
    content = onnx_model(TorchSampler.of(model)).SerializeToString()
    (folder / f"{name}.onnx").write_bytes(content)
    weights = sum(weight.numel() for weight in model.network.parameters())
    updates = model.config.training.num_updates
    facts.write_text(json.dumps({"seconds": taken, "updates": updates, "weights": weights}))


def draw(folder: Path) -> dict[str, tuple[np.ndarray, float]]:
    """Samples of each way to draw, and the seconds of one core per sample; those in the folder are kept."""
    single, low, second = (Sampler(folder / f"{name}.onnx", provider="cpu", threads=1) for name in FRACTIONS)
    ways: dict[str, tuple[Any, dict[str, float]]] = {"single model": (single, {})}
    for level in NOISE_LEVELS:
        ways[f"cascade, noise {level:g}"] = Cascade([low, second]), {"low_resolution_noise": level}
    found = {}
    for name, (sampler, options) in ways.items():
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.npz"
        if not path.exists():
            started = time.process_time()
            samples = sampler.sample(NUM_SAMPLES, **options)
            np.savez(path, samples=samples, seconds=(time.process_time() - started) / NUM_SAMPLES)
        content = np.load(path)
        found[name] = content["samples"], float(content["seconds"])
    return found


def write_report(data: Path, folder: Path, seconds: float) -> None:
    """Judge the samples and write the page."""
    drawn = draw(folder)
    dataset = load_dataset(DataConfig(name=str(data.absolute()), image_size=SIDE))
    features = fit_features(dataset, "auto")
    candidates = [Candidate(name, samples.astype(np.float64)) for name, (samples, _) in drawn.items()]
    judged = {each.candidate.name: each for each in judge(candidates, dataset, features)}
    facts = {name: json.loads((folder / f"{name}.json").read_text()) for name in FRACTIONS}
    rows = []
    for name, (_, per_sample) in drawn.items():
        values = judged[name].metrics
        rows.append(
            f"| {name} | {values['distance']:.4f} ± {values['distance_se']:.4f} | {values['auc']:.3f} ± "
            f"{values['auc_se']:.3f} | {values['frechet']:.1f} | {values['feature_auc']:.3f} | "
            f"{100 * values['copied']:.1f}% | {1000 * per_sample:.0f} ms | {judged[name].outcome} |"
        )
    floor = next(iter(judged.values())).metrics
    best = min(
        (name for name in drawn if name != "single model"), key=lambda name: judged[name].metrics["auc"]
    )
    shown = {name: drawn[name][0][:NUM_SHOWN] for name in ("single model", best)}
    assert dataset.spec.range is not None
    shown = {"training images": dataset.raw(dataset.train[:NUM_SHOWN]).astype(np.float32), **shown}
    (RESULTS / "cascade").mkdir(exist_ok=True)
    rows_of_images(shown, dataset.spec.range, COLUMNS).save(RESULTS / "cascade" / "samples.png")
    models = "\n".join(
        f"| {name} | {each['weights']:,} | {each['updates']:,} | {each['seconds']:.0f} |"
        for name, each in facts.items()
    )
    table = "\n".join(rows)
    (RESULTS / "cascade.md").write_text(f"""# A cascade against a single model

Written by `python -m benchmarks.cascade`: {seconds:g} s of one core for the training of the single model,
and as much for both models of the cascade together, of {LOW_SIDE} pixels and from {LOW_SIDE} to {SIDE}.
All are the presets of train.py, trained once each (seed 0), with nothing tuned but what the rows show.
{len(dataset.train):,} training images of {SIDE}x{SIDE} pixels; {NUM_SAMPLES} samples of each by the exported
files with the presets' samplers, compared with {len(dataset.val) + len(dataset.test):,} held-out images by
{dataset_features(features)} features. Lower is better everywhere; the floors, of as many training images, are
distance {floor["distance_floor"]:.4f}, AUC {floor["auc_floor"]:.3f}, Frechet {floor["frechet_floor"]:.1f} and
feature AUC {floor["feature_auc_floor"]:.3f}. Errors are standard errors over the samples; that another
training gives another model is not in them.

| model | weights | updates | training, s |
|---|---|---|---|
{models}

| samples of | distance | AUC | Frechet | feature AUC | copied | per sample | |
|---|---|---|---|---|---|---|---|
{table}

The noise is what is added to the low-resolution images between the models; the last column is the judge's
comparison with the best by distance.

![Training images, samples of the single model and of the cascade](cascade/samples.png)

Rows of training images, samples of the single model and of "{best}", not chosen.

{hardware()}; {versions()}.
""")


def dataset_features(features: Any) -> str:
    """Name of the features by which images were compared."""
    return "random" if features is None else str(features.name)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images of 28 pixels or more")
    parser.add_argument("--folder", type=Path, required=True, help="folder for models and samples")
    parser.add_argument("--seconds", type=float, default=80.0, help="training time of each way, of one core")
    parser.add_argument("--only", choices=list(FRACTIONS), help="train this model, and stop")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else FRACTIONS:
        train(name, options.data, options.folder, options.seconds)
    if not options.only:
        write_report(options.data, options.folder, options.seconds)


if __name__ == "__main__":
    main()
