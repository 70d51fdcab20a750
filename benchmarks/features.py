"""Which features without labels see what is wrong with images: planted defects of growing strength.

    python -m benchmarks.features FOLDER

FOLDER has subfolders of images by class, which are only used for a classifier, the yardstick. Each kind of
features is fitted to half of the images, grey and coloured (shape and ground of random hue). Images of the
other half are compared by the kernel distance with images that have a defect. What a kind of features sees
is the distance in units of the standard error for images without defect. Defects are not those that any
network is trained on. The table is written to benchmarks/results/features.md.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.evaluation.distances import MultiscaleKernel, kernel_distance
from diffusion.evaluation.features import SmallNetwork, load_or_train_on_degradations, random_network

SIDE, BATCH, UPDATES, NUM_COMPARED = 14, 128, 200, 500
RESULTS = Path(__file__).parent / "results" / "features.md"


def hues(count: int, value: float, generator: torch.Generator) -> Tensor:
    """Colours [count, 3, 1, 1] of random hue, saturation 0.6 and the given value, 0 to 1."""
    hue = 6.0 * torch.rand(count, 1, generator=generator)
    offsets = torch.tensor([5.0, 3.0, 1.0])
    k = (offsets + hue) % 6.0
    return (value * (1.0 - 0.6 * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)))[:, :, None, None]


def coloured(grey: Tensor, generator: torch.Generator, grounds: float = 0.0) -> Tensor:
    """Grey images in [-1, 1] with shape and ground of random hue; `grounds` makes these grounds brighter."""
    mask, ground = (grey + 1.0) / 2.0, hues(len(grey), 0.35, generator)
    ground = ground + grounds * (torch.rand(ground.shape, generator=generator) - 0.5)
    shape = hues(len(grey), 1.0, generator)
    return ((1.0 - mask) * ground + mask * shape).clamp(0.0, 1.0) * 2.0 - 1.0


def small(images: Tensor) -> Tensor:
    """Images shrunk to half their size and enlarged again."""
    half = F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)
    return F.interpolate(half, images.shape[2:], mode="bicubic").clamp(-1.0, 1.0)


# Defects of images in [-1, 1], by strength from 0 to 1.
def blurred(images: Tensor, strength: float) -> Tensor:
    return (1.0 - strength) * images + strength * small(images)


def grained(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    return (images + 0.3 * strength * noise).clamp(-1.0, 1.0)


def mixed(images: Tensor, strength: float) -> Tensor:
    """A fraction of the images is superimposed on others."""
    both = torch.maximum(images, images.roll(1, 0))
    return torch.where((torch.arange(len(images)) % 100 < 100 * strength)[:, None, None, None], both, images)


def broken(images: Tensor, strength: float) -> Tensor:
    """A fraction of the images lacks its middle rows."""
    middle = images.shape[2] // 2
    gaps = images.clone()
    gaps[:, :, middle - 1 : middle + 1] = images[:, :, :1, :1]
    return torch.where((torch.arange(len(images)) % 100 < 100 * strength)[:, None, None, None], gaps, images)


DEFECTS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "blur": (blurred, (0.05, 0.1, 0.2, 0.4)),
    "grain": (grained, (0.1, 0.2, 0.4, 0.8)),
    "two shapes in one": (mixed, (0.05, 0.1, 0.2, 0.4)),
    "broken strokes": (broken, (0.05, 0.1, 0.2, 0.4)),
}
GROUNDS, DROPPED = (0.1, 0.2, 0.4, 0.8), (0.25, 0.5, 0.75, 1.0)


def trained(network: nn.Module, loss_of: Callable[[Tensor], Tensor], images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=UPDATES)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loss_of(images[torch.randint(len(images), (BATCH,))]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def classifier(images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Trained on labels; the yardstick."""
    torch.manual_seed(0)
    network = SmallNetwork(images.shape[1], int(labels.max()) + 1)
    joined = torch.cat([images, labels[:, None, None, None].expand(-1, 1, *images.shape[2:])], 1)
    trained(network, lambda batch: F.cross_entropy(network(batch[:, :-1]), batch[:, -1, 0, 0].long()), joined)
    return network.features


def denoising(images: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    """Hidden layer of an autoencoder that removes noise of random strength."""
    torch.manual_seed(0)
    encoder = SmallNetwork(images.shape[1], 1)
    decoder = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, images[0].numel()))
    both = nn.ModuleList([encoder, decoder])

    def loss(batch: Tensor) -> Tensor:
        noisy = batch + torch.rand(len(batch), 1, 1, 1) * torch.randn_like(batch)
        return F.mse_loss(decoder(encoder.features(noisy)), batch.flatten(1))

    trained(both, loss, images)
    return encoder.features


def contrastive(images: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    """Finds the other of two shifted, slightly noisy copies among a batch (SimCLR, arXiv:2002.05709)."""
    torch.manual_seed(0)
    network, head = SmallNetwork(images.shape[1], 1), nn.Linear(64, 32)

    def view(batch: Tensor) -> Tensor:
        padded = F.pad(batch, (1, 1, 1, 1), mode="replicate")
        down, right = torch.randint(3, (2,)).tolist()
        shifted = padded[:, :, down : down + batch.shape[2], right : right + batch.shape[3]]
        return F.normalize(head(network.features(shifted + 0.1 * torch.randn_like(shifted))), dim=1)

    def loss(batch: Tensor) -> Tensor:
        similarities = view(batch) @ view(batch).T / 0.2
        return F.cross_entropy(similarities, torch.arange(len(batch)))

    trained(nn.ModuleList([network, head]), loss, images)
    return network.features


def degradations(images: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    """Tells in which way an image was degraded, as `fit_features` without classes."""
    with tempfile.TemporaryDirectory() as folder:
        return load_or_train_on_degradations(images, UPDATES, Path(folder) / "network").features


def random(images: Tensor, _: Tensor) -> Callable[[Tensor], Tensor]:
    return random_network(images.shape[1]).features


KINDS = (random, classifier, degradations, contrastive, denoising)
# Features of two kinds side by side, each with half the weight.
PAIRS = (("random", "classifier"), ("random", "degradations"), ("random", "contrastive"))


def standardised(features: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """Features with mean 0 and standard deviation 1 over images, divided by the root of their number."""
    fitted = features(images)
    mean, std = fitted.mean(0), fitted.std(0)
    std = std.where(std > 1e-6 * std.max(), torch.inf)
    return lambda batch: (features(batch) - mean) / std / fitted.shape[1] ** 0.5


def table(grey: Tensor, labels: Tensor, colour: bool) -> list[str]:
    """Rows of a Markdown table: each kind of features, and the visibility of each defect.

    Args:
        grey: images [N, 1, H, W] in [-1, 1].
        labels: int64 [N].
        colour: whether shapes and grounds get random hues.
    """
    half = len(grey) // 2
    images = coloured(grey, torch.Generator().manual_seed(0)) if colour else grey
    fresh = slice(half + NUM_COMPARED, half + 2 * NUM_COMPARED)
    plain = coloured(grey[fresh], torch.Generator().manual_seed(1)) if colour else grey[fresh]
    cases = {name: [defect(plain, s) for s in strengths] for name, (defect, strengths) in DEFECTS.items()}
    kept, index = labels[fresh] != 3, torch.arange(len(plain))
    cases["a class dropped"] = [plain[kept | (index % 100 >= 100 * dropped)] for dropped in DROPPED]
    if colour:
        cases["colour of the grounds"] = [
            coloured(grey[fresh], torch.Generator().manual_seed(1), strength) for strength in GROUNDS
        ]

    @torch.no_grad()
    def row(name: str, seconds: float, features: Callable[[Tensor], Tensor]) -> str:
        reference = features(images[half : half + NUM_COMPARED])
        kernel = MultiscaleKernel.of(reference)
        null = kernel_distance(features(plain), reference, kernel)
        cells = []
        for variants in cases.values():
            values = [kernel_distance(features(each), reference, kernel).value for each in variants]
            cells.append(" ".join(f"{(value - null.value) / null.standard_error:.1f}" for value in values))
        print(line := f"| {name} | {seconds:.0f} | {' | '.join(cells)} |", flush=True)
        return line

    rows = [f"| features | seconds | {' | '.join(cases)} |", "|---" * (len(cases) + 2) + "|"]
    found, seconds = {}, {}
    for kind in KINDS:
        started = time.process_time()
        features = kind(images[:half], labels[:half])
        name = kind.__name__
        seconds[name] = time.process_time() - started
        with torch.no_grad():
            found[name] = standardised(features, images[:half])
        rows.append(row(name, seconds[name], found[name]))
    for one, other in PAIRS:
        side_by_side = functools.partial(joined, (found[one], found[other]))
        rows.append(row(f"{one} + {other}", seconds[one] + seconds[other], side_by_side))
    return rows


def joined(parts: Iterable[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    """Several features side by side."""
    return torch.cat([part(images) for part in parts], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    torch.set_num_threads(1)
    data = load_dataset(DataConfig(name=str(folder), image_size=SIDE))
    grey, labels = torch.from_numpy(data.raw(data.train[:])).float() / 127.5 - 1.0, data.train.labels
    assert labels is not None
    lines = [
        f"`python -m benchmarks.features FOLDER`: kernel distance of {NUM_COMPARED} images with a defect, in "
        "units of the standard error without one, at four strengths; seconds to fit on one core. Noise "
        "is about 1: larger is more visible.",
        *("", "## Grey", "", *table(grey, labels, colour=False)),
        *("", "## Coloured", "", *table(grey, labels, colour=True)),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
