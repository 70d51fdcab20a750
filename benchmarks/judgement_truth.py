"""How far samples are from fresh examples, by yardsticks that no objective and no `sample/...` metric uses.

Everything here is written for `benchmarks.judgement` alone: it imports nothing of the project. Lower is
better.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from torch import nn

Array = NDArray[np.float64]
_PRINCIPAL_COMPONENTS = 16
_KERNEL_ROWS = 6_000  # of each kind: kernels of all pairs take gigabytes
_FAR = 1e3  # what samples that are not finite are replaced by: as bad as can be, and still a number


def of_points(samples: Array, fresh: Array) -> dict[str, float]:
    """Distances of points, in units of the fresh rows' standard deviations.

    trees: AUC of randomised trees that tell the two apart, in three folds; 0.5 is chance.
    gaussian_mmd: squared maximum mean discrepancy of Gaussian kernels at five widths, each over its floor's
        scale, see `_gaussian_mmd`.
    cells: total variation over 256 cells of equally many fresh rows.
    neighbours: share of the five nearest neighbours, among both, that are of the same kind; 0.5 is chance.
    """
    count = min(len(samples), len(fresh))
    samples = np.where(np.isfinite(samples), samples, _FAR)[:count]
    scale, centre = fresh.std(axis=0), fresh.mean(axis=0)
    x, y = (samples - centre) / scale, (fresh[:count] - centre) / scale
    return {
        "trees": _trees(x, y),
        "gaussian_mmd": _gaussian_mmd(x[:_KERNEL_ROWS], y[:_KERNEL_ROWS]),
        "cells": _cells(x, y),
        "neighbours": _neighbours(x, y),
    }


def of_pictures(
    samples: NDArray[np.uint8],
    fresh: NDArray[np.uint8],
    features: "DigitFeatures",
) -> dict[str, float]:
    """Distances of images, uint8 [images, C, H, W].

    network: AUC of a small convolutional network that tells the two apart, in two folds.
    frechet: Frechet distance on features of a digit classifier that was fitted to other images.
    trees: AUC of randomised trees on 16 principal components of the pixels.
    neighbours: share of the five nearest neighbours of the same kind, on the same components.
    spectrum: largest difference of the log radial power spectra.
    mean_colour: largest ratio, over the channels, of the spreads of the images' means; its log.
    """
    count = min(len(samples), len(fresh))
    x, y = samples[:count], fresh[:count]
    components = PCA(_PRINCIPAL_COMPONENTS, random_state=0).fit(_flat(fresh))
    a, b = components.transform(_flat(x)), components.transform(_flat(y))
    spreads = [images.mean(axis=(2, 3)).std(axis=0) + 1e-3 for images in (samples, fresh)]
    return {
        "network": _network(x, y),
        "frechet": _frechet(features(samples), features(fresh)),
        "trees": _trees(a, b),
        "neighbours": _neighbours(a, b),
        "spectrum": float(np.abs(_log_spectrum(x) - _log_spectrum(y)).max()),
        "mean_colour": float(np.abs(np.log(spreads[0] / spreads[1])).max()),
    }


class DigitFeatures:
    """The last hidden layer of a small classifier, float64 [images, 32].

    Args:
        images: uint8 [images, C, H, W].
        labels: int64 [images].
        epochs: passes over the images.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], epochs: int = 5) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._body = _convolutions(images.shape[1], 32)
            _fit(self._body, nn.Linear(32, int(labels.max()) + 1), _tensor(images), labels, epochs)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Array:
        return _in_batches(self._body, _tensor(images))


def _trees(x: Array, y: Array) -> float:
    rows = np.concatenate([x, y])
    target = np.repeat([0, 1], [len(x), len(y)])
    trees = ExtraTreesClassifier(40, min_samples_leaf=5, max_features=None, random_state=0)
    order = np.random.default_rng(0).permutation(len(rows))
    chance = cross_val_predict(trees, rows[order], target[order], cv=3, method="predict_proba")
    return float(roc_auc_score(target[order], chance[:, 1]))


def _gaussian_mmd(x: Array, y: Array) -> float:
    """Mean over five widths of the unbiased MMD^2 over the mean kernel of the fresh rows.

    The widths are geometric from a hundredth of the median distance of fresh rows to that distance.
    """
    squares = [cdist(*pair, "sqeuclidean").astype(np.float32) for pair in ((x, x), (y, y), (x, y))]
    median = np.median(squares[1][np.triu_indices(len(y), 1)])
    within_x, within_y, between = (torch.from_numpy(each) for each in squares)

    def kernel_sum(square: torch.Tensor, width: float) -> float:
        return torch.exp(square / (-2.0 * width)).sum(dtype=torch.float64).item()

    found = []
    for width in np.geomspace(1e-4, 1.0, 5) * float(median):
        xx, yy = (
            (kernel_sum(each, width) - len(each)) / (len(each) * (len(each) - 1))
            for each in (within_x, within_y)
        )
        found.append((xx + yy - 2.0 * kernel_sum(between, width) / between.numel()) / yy)
    return float(np.mean(found))


def _cells(x: Array, y: Array, levels: int = 8) -> float:
    """Total variation over the cells that half of the fresh rows define, each halved at its median."""
    half = len(y) // 2
    counts: list[tuple[int, int]] = []

    def split(define: Array, a: Array, b: Array, level: int) -> None:
        if level == levels:
            counts.append((len(a), len(b)))
            return
        axis = int(np.argmax(np.ptp(np.quantile(define, [0.1, 0.9], axis=0), axis=0)))
        cut = np.median(define[:, axis])
        for low in (True, False):
            split(*(each[(each[:, axis] <= cut) == low] for each in (define, a, b)), level + 1)

    split(y[:half], x, y[half:], 0)
    a, b = np.array(counts, dtype=np.float64).T
    return float(0.5 * np.abs(a / a.sum() - b / b.sum()).sum())


def _neighbours(x: Array, y: Array, k: int = 5) -> float:
    """Nearest-neighbour two-sample statistic (Schilling, J. Am. Stat. Assoc. 81, 1986)."""
    rows = np.concatenate([x, y])
    kind = np.repeat([0, 1], [len(x), len(y)])
    nearest = KDTree(rows).query(rows, k=k + 1)[1][:, 1:]
    return float((kind[nearest] == kind[:, None]).mean())


def _network(x: NDArray[np.uint8], y: NDArray[np.uint8]) -> float:
    images = _tensor(np.concatenate([x, y]))
    target = np.repeat([0, 1], [len(x), len(y)])
    fold = np.random.default_rng(0).integers(0, 2, len(target))
    chance = np.empty(len(target))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for held_out in range(2):
            body, head = _convolutions(images.shape[1], 32), nn.Linear(32, 2)
            seen = fold != held_out
            _fit(body, head, images[torch.from_numpy(seen)], target[seen], epochs=4)
            logits = _in_batches(nn.Sequential(body, head), images[torch.from_numpy(~seen)])
            chance[~seen] = logits[:, 1] - logits[:, 0]
    return float(np.mean([roc_auc_score(target[fold == each], chance[fold == each]) for each in range(2)]))


def _frechet(x: Array, y: Array) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    # The trace of the root of a @ b, whose eigenvalues are those of a positive semidefinite matrix.
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0.0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2.0 * root)


def _log_spectrum(images: NDArray[np.uint8]) -> Array:
    """Log of the mean power by radius, without the mean of each image."""
    values = images / 255.0
    power = np.abs(np.fft.fft2(values - values.mean(axis=(2, 3), keepdims=True))) ** 2
    power = power.mean(axis=(0, 1))
    frequencies = [np.fft.fftfreq(size) * size for size in power.shape]
    radius = np.hypot(frequencies[0][:, None], frequencies[1][None]).round().astype(int)
    sums = np.bincount(radius.ravel(), power.ravel()) / np.bincount(radius.ravel())
    return np.log(sums[1 : min(power.shape) // 2 + 1] + 1e-9)


def _convolutions(channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192, size),
        nn.ReLU(),
    )


def _fit(
    body: nn.Module, head: nn.Module, images: torch.Tensor, labels: NDArray[np.int64], epochs: int
) -> None:
    target = torch.from_numpy(np.asarray(labels))
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(128):
            loss = nn.functional.cross_entropy(head(body(images[index])), target[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def _in_batches(network: nn.Module, images: torch.Tensor) -> Array:
    return torch.cat([network(batch) for batch in images.split(500)]).double().numpy()


def _tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / 255.0)


def _flat(images: NDArray[np.uint8]) -> Array:
    return images.reshape(len(images), -1).astype(np.float64)
