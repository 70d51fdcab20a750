"""Feature networks, and the standardised features by which images are compared."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.config import FeatureNetwork
from diffusion.data.dataset import Dataset
from diffusion.data.sources import CACHE
from diffusion.devices import has_float64, to_float64
from diffusion.errors import InputError
from diffusion.files import os_reason, relative_path, replacing

_MAX_SIDE, _INCEPTION_SIDE = 32, 299  # image sizes of the small networks and of Inception
_NUM_HIDDEN = 64
_SEED = 0  # of all weights and of the classifier's training
_BATCH_SIZE = 256

# Training of the networks. A change to it needs a new version, so that older cached files are not read.
CLASSIFIER_UPDATES = 800
DEGRADATION_UPDATES, _NUM_DEGRADATIONS = 200, 6
_CLASSIFIER_BATCH_SIZE, _CLASSIFIER_LEARNING_RATE = 128, 2e-3
_TRAINING_LINE = "training the network whose features images are compared by ({})"
_VERSIONS = {"classifier": "1", "degradations": "degradations-1"}
_MIN_IMAGES_PER_CLASS = 20

# Limits on the training images that features are fitted to, which are in memory as float64.
_MAX_IMAGES, _MAX_VALUES = 20_000, 2**26


class SmallNetwork(nn.Module):
    """Three convolutions, and for a classifier a hidden layer; images [batch, C, H, W] in [-1, 1].

    Args:
        channels: C.
        num_classes: number of classes of a classifier, whose features are its hidden layer; with 0 the
            features are the spatial means of each convolution.
    """

    def __init__(self, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        widths = (channels, 32, 64, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[index], widths[index + 1], 3, stride=1 if index == 0 else 2, padding=1)
            for index in range(3)
        )
        self.hidden = nn.Linear(4 * widths[-1], _NUM_HIDDEN) if num_classes else None
        self.head = nn.Linear(_NUM_HIDDEN, num_classes) if num_classes else None

    def features(self, images: Tensor) -> Tensor:
        """Features [batch, features]."""
        x, means = images, []
        for convolution in self.convolutions:
            x = nn.functional.silu(convolution(x))
            means.append(x.mean(dim=(2, 3)))
        if self.hidden is None:
            return torch.cat(means, dim=1)
        return nn.functional.silu(self.hidden(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """A classifier's logits [batch, classes]."""
        assert self.head is not None
        return self.head(self.features(images))


class Inception(nn.Module):
    """torchvision's Inception v3 up to its last pooling layer: 2,048 features.

    Raises:
        InputError: the weights are not on this machine and cannot be downloaded.
    """

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import Inception_V3_Weights, inception_v3

        weights = Inception_V3_Weights.IMAGENET1K_V1
        try:
            self.network = inception_v3(weights=weights)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"--metrics.features inception: its weights could not be downloaded ({reason}): put "
                f"{Path(weights.url).name} into {torch.hub.get_dir()}/checkpoints, or give random"
            ) from error
        self.network.fc = nn.Identity()
        # It would rescale images with ImageNet's normalisation to [-1, 1], where ours already are.
        self.network.transform_input = False

    def features(self, images: Tensor) -> Tensor:
        """Features [batch, 2048] of images [batch, C, H, W] in [-1, 1].

        Images with one or two channels are shown as grey by their first one; channels after the third are
        ignored.
        """
        rgb = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        size = (_INCEPTION_SIDE, _INCEPTION_SIDE)
        return self.network(nn.functional.interpolate(rgb, size, mode="bilinear", antialias=True))


class WithRandomFeatures(nn.Module):
    """A trained network's features beside those of a random one.

    A trained network drops what its task does not need: a classifier of digits hardly sees blur, grain or
    colours, which the random convolutions see (benchmarks/results/features.md).
    """

    def __init__(self, trained: SmallNetwork, random: SmallNetwork) -> None:
        super().__init__()
        self.trained, self.random = trained, random

    def features(self, images: Tensor) -> Tensor:
        """Features [batch, features], those of the trained network first."""
        return torch.cat([self.trained.features(images), self.random.features(images)], dim=1)


def degrade(images: Tensor, how: Tensor) -> Tensor:
    """Images [batch, C, H, W] in [-1, 1], each degraded in one of six ways, with random strength.

    Args:
        images: the images.
        how: int64 [batch], for each image: 0 unchanged, 1 blurred, 2 noisy, 3 contrast and brightness of each
            channel changed, 4 a band of the next image of the batch in it, 5 shifted in parts.
    """
    count, channels = images.shape[:2]
    strength = torch.rand(count, 1, 1, 1, device=images.device)
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    blurred = images + strength * (nn.functional.avg_pool2d(padded, 3, stride=1) - images)
    noisy = images + 0.3 * strength * torch.randn_like(images)
    gain, offset = (
        strength * (2.0 * torch.rand(count, channels, 1, 1, device=images.device) - 1.0) for _ in range(2)
    )
    tinted = images * (1.0 + 0.5 * gain) + 0.5 * offset
    rows = torch.arange(images.shape[2], device=images.device)[None, None, :, None]
    start = images.shape[2] * torch.rand_like(strength)
    band = (rows >= start) & (rows < start + images.shape[2] / 2.0)
    foreign = torch.where(band, images.roll(1, 0), images)
    torn = torch.where(band, images.roll(2, 3), images)
    ways = torch.stack([images, blurred, noisy, tinted, foreign, torn])
    return ways[how, torch.arange(count, device=how.device)].clamp(-1.0, 1.0)


def load_or_train_on_degradations(
    images: Tensor, updates: int, cached: Path, notify: Callable[[str], None] = lambda line: None
) -> SmallNetwork:
    """A `SmallNetwork` that tells in which way an image was degraded, see `degrade`.

    Args:
        images: [N, C, H, W] in [-1, 1].
        updates: number of optimizer steps.
        cached: file to read the network from, or to write it to, as for `load_or_train_classifier`.
        notify: as for `fit_features`.
    """
    network = _initialised(images.shape[1], _NUM_DEGRADATIONS)
    if _read(network, cached) is not None:
        return network
    notify(_TRAINING_LINE.format("degradations"))
    network = _initialised(images.shape[1], _NUM_DEGRADATIONS)

    def batch(rows: Tensor) -> tuple[Tensor, Tensor]:
        how = torch.randint(_NUM_DEGRADATIONS, (len(rows),))
        return degrade(images[rows], how), how

    _train(network, len(images), updates, batch)
    _write(network, math.nan, cached, notify)
    return network


def _train(
    network: SmallNetwork, num_images: int, updates: int, batch: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Train a network to name the classes of `batch(rows)`, the images and classes of random rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _CLASSIFIER_LEARNING_RATE, total_steps=updates
        )
        for _ in range(updates):
            images, classes = batch(torch.randint(num_images, (_CLASSIFIER_BATCH_SIZE,)))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), classes).backward()
            optimizer.step()
            schedule.step()


def random_network(channels: int) -> SmallNetwork:
    """A `SmallNetwork` with fixed random weights."""
    return _initialised(channels, 0)


def load_or_train_classifier(
    images: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    num_classes: int,
    cached: Path,
    notify: Callable[[str], None] = lambda line: None,
) -> tuple[SmallNetwork, float]:
    """A `SmallNetwork` trained on labelled images, and its accuracy on held-out ones.

    Args:
        images: [N, C, H, W] in [-1, 1].
        labels: int64 [N].
        held_out: images and labels that the accuracy is measured on.
        num_classes: number of classes.
        cached: file to read the classifier from, or to write it to if it cannot be read; its name must
            identify the data.
        notify: as for `fit_features`.
    """
    network = _initialised(images.shape[1], num_classes)
    if (accuracy := _read(network, cached)) is not None:
        return network, accuracy
    notify(_TRAINING_LINE.format("classifier"))
    network = _initialised(images.shape[1], num_classes)  # an unusable file may have set some weights
    _train(network, len(images), CLASSIFIER_UPDATES, lambda rows: (images[rows], labels[rows]))
    with torch.no_grad():
        predicted = torch.cat([network(batch).argmax(dim=1) for batch in held_out[0].split(512)])
    accuracy = float((predicted == held_out[1]).double().mean())
    _write(network, accuracy, cached, notify)
    return network, accuracy


def _initialised(channels: int, num_classes: int) -> SmallNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return SmallNetwork(channels, num_classes)


def _read(network: SmallNetwork, cached: Path) -> float | None:
    """Load the network's weights from a file and return its accuracy; None if there is no usable file."""
    try:
        with safe_open(cached, "pt") as file:
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
            return float(json.loads(file.metadata()["accuracy"]))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        return None


def _write(network: SmallNetwork, accuracy: float, cached: Path, notify: Callable[[str], None]) -> None:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as part:
            save_file(network.state_dict(), part, {"accuracy": json.dumps(accuracy)})
    except (OSError, SafetensorError) as error:
        notify(
            f"it is trained again at every start, since {relative_path(cached.parent)} cannot be written "
            f"({os_reason(error)})"
        )


@dataclass(frozen=True, eq=False)
class Features:
    """Standardised features of a network, callable on images.

    Attributes:
        name: classifier, degradations, random or inception.
        network: a network with a `features` method, in evaluation mode.
        value_range: lowest and highest possible value of the images, in data units.
        mean, std: float64 [features], mean and standard deviation over the training split; of a trained
            network and a random one, standard deviations are scaled so that each has half the variance.
        accuracy: accuracy of a classifier on the validation split, else None.
    """

    name: FeatureNetwork
    network: nn.Module
    value_range: tuple[float, float]
    mean: Tensor
    std: Tensor
    accuracy: float | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Standardised features of images [batch, C, H, W] in data units: float64 [batch, features]."""
        batches = [self._features(batch.to(self.mean.device)) for batch in images.split(_BATCH_SIZE)]
        return (torch.cat(batches) - self.mean) / self.std

    def to(self, device: str | torch.device) -> "Features":
        """A copy on another device; itself on a device without float64, in which features are compared."""
        if not has_float64(torch.device(device)):
            return self
        network = copy.deepcopy(self.network).to(device)
        return replace(self, network=network, mean=self.mean.to(device), std=self.std.to(device))

    def _features(self, images: Tensor) -> Tensor:
        inputs = _preprocess(images, self.value_range, self.name)
        return to_float64(self.network.features(inputs))  # type: ignore[operator]


def fit_features(
    dataset: Dataset, requested: FeatureNetwork, notify: Callable[[str], None] = lambda line: None
) -> Features | None:
    """The features by which images of a data set are compared; None for points.

    Args:
        dataset: the data, on the CPU.
        requested: the feature network; "auto" is a classifier if the data have two classes or more, each
            of 20 training images or more, and otherwise a network trained to tell degradations of the
            images apart. Either stands beside a random network, see `WithRandomFeatures`.
        notify: receives a line before a network is trained, which takes seconds; not if it is read from the
            cache, where it is kept by the data's fingerprint. And a line if it cannot be kept there.

    Raises:
        InputError: a classifier is requested without such classes, or Inception's weights are not
            available.
    """
    spec, value_range = dataset.spec, dataset.spec.range
    if value_range is None:
        return None
    name: FeatureNetwork = requested
    if requested in ("auto", "classifier"):
        name = "classifier" if _can_be_classified(dataset) else "degradations"
        if requested == "classifier" and name != "classifier":
            raise InputError(
                f"--metrics.features classifier: {spec.name} needs two classes or more, each of "
                f"{_MIN_IMAGES_PER_CLASS} training images or more; give degradations, or auto"
            )
    accuracy = None
    network: nn.Module
    trained: SmallNetwork | None = None
    count = max(1, min(_MAX_IMAGES, _MAX_VALUES // math.prod(spec.shape)))
    images = torch.from_numpy(dataset.raw(dataset.train[:count]))
    cached = CACHE.expanduser() / "features" / f"{spec.fingerprint}-{_VERSIONS.get(name)}.safetensors"
    if name == "classifier":
        held_out, labels = torch.from_numpy(dataset.raw(dataset.val[:count])), dataset.train.labels
        assert labels is not None and dataset.val.labels is not None
        trained, accuracy = load_or_train_classifier(
            _preprocess(images, value_range, name),
            labels[:count],
            (_preprocess(held_out, value_range, name), dataset.val.labels[:count]),
            int(labels.max()) + 1,
            cached,
            notify,
        )
    elif name == "degradations":
        prepared = _preprocess(images, value_range, name)
        trained = load_or_train_on_degradations(prepared, DEGRADATION_UPDATES, cached, notify)
    if trained is not None:
        network = WithRandomFeatures(trained, random_network(spec.shape[0]))
    else:
        network = Inception() if name == "inception" else random_network(spec.shape[0])
    zero = torch.zeros((), dtype=torch.float64)
    unscaled = Features(name, network.eval().requires_grad_(False), value_range, zero, zero + 1.0, accuracy)
    values = unscaled(images)
    # Features that never vary carry no information: dividing them by infinity makes them 0.
    std = values.std(dim=0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.inf)
    if trained is not None:
        # Each of the two networks has half the variance, whatever the number of its features.
        sizes = torch.full_like(std, len(std) - _NUM_HIDDEN)
        sizes[:_NUM_HIDDEN] = _NUM_HIDDEN
        std = std * (2.0 * sizes / len(std)).sqrt()
    return replace(unscaled, mean=values.mean(dim=0), std=std)


def _preprocess(images: Tensor, value_range: tuple[float, float], name: FeatureNetwork) -> Tensor:
    """Images in data units as a network's input: float32 in [-1, 1], shrunk for the small networks."""
    low, high = value_range
    scaled = ((images - low) / (high - low) * 2.0 - 1.0).float()
    if name == "inception" or max(scaled.shape[2:]) <= _MAX_SIDE:
        return scaled
    size = [min(side, _MAX_SIDE) for side in scaled.shape[2:]]
    return nn.functional.interpolate(scaled, size, mode="bilinear", antialias=True)


def _can_be_classified(dataset: Dataset) -> bool:
    """Whether both splits have labels, and there are enough training images of each of several classes."""
    labels = dataset.train.labels
    if labels is None or dataset.val.labels is None:
        return False
    counts = torch.bincount(labels[:_MAX_IMAGES])
    return len(counts) > 1 and int(counts.min()) >= _MIN_IMAGES_PER_CLASS
