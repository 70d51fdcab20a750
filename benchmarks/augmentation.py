"""Does augmentation help where there are few images, without showing in the samples?

    python -m benchmarks.augmentation --data ~/mnist --folder /tmp/augmentation    # ten minutes on one core

Trains the preset's U-Net on 1,000 images, reduced to 14 pixels, with several probabilities of augmentation,
each for as many seconds of one core. Judges equally many samples of each by images that are not among the
1,000. What is already in the folder is kept. Writes benchmarks/results/augmentation.md and its picture.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.budget import train_for
from benchmarks.table import hardware, versions
from diffusion.config import Config, DataConfig
from diffusion.data.dataset import Dataset, Split, load_dataset
from diffusion.data.sources import open_source
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features import fit_features
from diffusion.plots import rows_of_images
from diffusion.presets import source_preset
from diffusion.training.checkpoints import TrainedModel
from workflows.evaluation.candidates import Candidate
from workflows.evaluation.judge import judge

RESULTS = Path(__file__).parent / "results"
SIDE, NUM_IMAGES = 14, 1000
PROBABILITIES = (0.0, 0.12)
NUM_SAMPLES, NUM_SHOWN, COLUMNS = 300, 24, 12


def few_images(data: Path) -> Dataset:
    """The first 1,000 training images; what is not among them is held out."""
    dataset = load_dataset(DataConfig(name=str(data.absolute()), image_size=SIDE))
    assert isinstance(dataset.train, Split)
    whole, few = dataset.train, slice(NUM_IMAGES)
    labels = None if whole.labels is None else whole.labels[few]
    train = Split(whole.values[few], whole.mean, whole.std, labels)
    return Dataset(dataset.spec, train, dataset.val, dataset.test)


def config_of(data: Path, probability: float) -> Config:
    """The preset's config with a probability of augmentation."""
    source = open_source(DataConfig(name=str(data.absolute()), image_size=SIDE))
    return source_preset(source, alone=True).with_values({"training.augment": probability})


def train(probability: float, data: Path, folder: Path, seconds: float) -> None:
    """Train a model and draw its samples, unless the folder has them."""
    facts = folder / f"{probability:g}.json"
    if facts.exists():
        return
    torch.set_num_threads(1)
    dataset = few_images(data)
    model, taken = train_for(config_of(data, probability), dataset, seconds)
    model.save(folder / f"{probability:g}")
    evaluator = Evaluator(model.config.with_values({"metrics.num_examples": 1024}), dataset)
    drawn = dataset.raw(evaluator.samples(model.network, num_samples=NUM_SAMPLES, seed=1))
    np.save(folder / f"{probability:g}.npy", drawn.astype(np.float32))
    _, bound = evaluator.held_out_losses(model.network)
    row = {"seconds": taken, "updates": model.config.training.num_updates, "elbo": bound.value}
    facts.write_text(json.dumps({**row, "elbo_se": bound.standard_error}))


def write_report(data: Path, folder: Path, seconds: float) -> None:
    """Judge the samples and write the page."""
    dataset = few_images(data)
    drawn = {f"{each:g}": np.load(folder / f"{each:g}.npy") for each in PROBABILITIES}
    # The features are those of all images: they are the yardstick, and no model has seen them.
    features = fit_features(load_dataset(DataConfig(name=str(data.absolute()), image_size=SIDE)), "auto")
    candidates = [Candidate(name, samples.astype(np.float64)) for name, samples in drawn.items()]
    judged = {each.candidate.name: each for each in judge(candidates, dataset, features)}
    rows = []
    for name in drawn:
        values, facts = judged[name].metrics, json.loads((folder / f"{name}.json").read_text())
        epochs = facts["updates"] * TrainedModel.load(folder / name).config.training.batch_size / NUM_IMAGES
        rows.append(
            f"| {name} | {facts['updates']:,} ({epochs:.0f}) | {facts['elbo']:.4f} ± "
            f"{facts['elbo_se']:.4f} | "
            f"{values['distance']:.4f} ± {values['distance_se']:.4f} | {values['auc']:.3f} ± "
            f"{values['auc_se']:.3f} | {values['frechet']:.1f} | {100 * values['copied']:.1f}% | "
            f"{judged[name].outcome} |"
        )
    floor = next(iter(judged.values())).metrics
    shown = {f"augment {name}": samples[:NUM_SHOWN] for name, samples in drawn.items()}
    assert dataset.spec.range is not None
    (RESULTS / "augmentation").mkdir(exist_ok=True)
    rows_of_images(shown, dataset.spec.range, COLUMNS).save(RESULTS / "augmentation" / "samples.png")
    table = "\n".join(rows)
    (RESULTS / "augmentation.md").write_text(f"""# Augmentation on {NUM_IMAGES:,} images

Written by `python -m benchmarks.augmentation`: the preset's U-Net, trained on {NUM_IMAGES:,} images
reduced to {SIDE}x{SIDE} pixels for {seconds:g} s of one core (seed 0), with several `--training.augment`.
{NUM_SAMPLES} samples of each, compared with {len(dataset.val) + len(dataset.test):,} held-out images. Lower
is better everywhere; the floors, of as many training images, are distance {floor["distance_floor"]:.4f}, AUC
{floor["auc_floor"]:.3f} and Frechet {floor["frechet_floor"]:.1f}. `copied`: samples that are less than a
third as far from the nearest training image as from the next; of held-out images
{100 * floor["copied_floor"]:.1f}% are. Errors are standard errors over the samples; that another training
gives another model is not in them.

| augment | updates (epochs) | ELBO window | distance | AUC | Frechet | copied | |
|---|---|---|---|---|---|---|---|
{table}

The last column is the judge's comparison with the best by distance.

![Samples without augmentation, and with each probability](augmentation/samples.png)

{hardware()}; {versions()}.
""")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--folder", type=Path, required=True, help="folder for models and samples")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="training time of each model, of one core"
    )
    parser.add_argument("--only", type=float, choices=PROBABILITIES, help="train this model, and stop")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for probability in PROBABILITIES if options.only is None else [options.only]:
        train(probability, options.data, options.folder, options.seconds)
    if options.only is None:
        write_report(options.data, options.folder, options.seconds)


if __name__ == "__main__":
    main()
