"""The networks whose features images are compared by."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.errors import InputError
from diffusion.files import replacing

_SIZE = 64
_SEED = 0
_STEPS, _BATCH, _LEARNING_RATE = 800, 128, 2e-3
_INCEPTION_SIDE = 299


class SmallNetwork(nn.Module):
    """Three convolutions and a layer of features; images [batch, C, H, W] in [-1, 1].

    Args:
        channels: C.
        num_classes: of the classifier; 0 leaves it out, and features are means over each convolution.
    """

    def __init__(self, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        widths = (channels, 32, 64, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(widths[place], widths[place + 1], 3, stride=1 if place == 0 else 2, padding=1)
            for place in range(3)
        )
        self.hidden = nn.Linear(4 * widths[-1], _SIZE) if num_classes else None
        self.head = nn.Linear(_SIZE, num_classes) if num_classes else None

    def features(self, images: Tensor) -> Tensor:
        """[batch, features]."""
        x, means = images, []
        for convolution in self.convolutions:
            x = nn.functional.silu(convolution(x))
            means.append(x.mean(dim=(2, 3)))
        if self.hidden is None:
            return torch.cat(means, dim=1)
        return nn.functional.silu(self.hidden(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes: [batch, classes]."""
        assert self.head is not None
        return self.head(self.features(images))


def random_network(channels: int) -> SmallNetwork:
    """A `SmallNetwork` with the weights of a fixed seed."""
    return _seeded(channels, 0)


def classifier(
    images: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    num_classes: int,
    cached: Path,
) -> tuple[SmallNetwork, float]:
    """A `SmallNetwork` trained on labelled images, and its accuracy on others.

    Args:
        images: [N, C, H, W] in [-1, 1].
        labels: int64 [N].
        held_out: the same of the images that its accuracy is taken on.
        num_classes: how many there are.
        cached: file that it is read from, or else written to; its name stands for the data.
    """
    network = _seeded(images.shape[1], num_classes)
    if (accuracy := _read(network, cached)) is not None:
        return network, accuracy
    network = _seeded(images.shape[1], num_classes)  # a file that did not fit may have filled a part
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
        for _ in range(_STEPS):
            rows = torch.randint(len(images), (_BATCH,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        guesses = torch.cat([network(part).argmax(dim=1) for part in held_out[0].split(512)])
    accuracy = float((guesses == held_out[1]).double().mean())
    _write(network, accuracy, cached)
    return network, accuracy


class Inception(nn.Module):
    """torchvision's Inception v3 up to its last pooling: 2,048 features.

    Raises:
        InputError: its weights are not on this machine and cannot be downloaded.
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
        self.network.transform_input = False  # what makes [-1, 1] of ImageNet's normalisation

    def features(self, images: Tensor) -> Tensor:
        """[batch, 2048] of images [batch, C, H, W] in [-1, 1]; one channel is grey, a fourth is left out."""
        colours = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        side = (_INCEPTION_SIDE, _INCEPTION_SIDE)
        return self.network(nn.functional.interpolate(colours, side, mode="bilinear", antialias=True))


def _read(network: SmallNetwork, cached: Path) -> float | None:
    """Fill the network from a file and return its accuracy, or None where there is no usable file."""
    try:
        with safe_open(cached, "pt") as file:
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
            return float(json.loads(file.metadata()["accuracy"]))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        return None


def _write(network: SmallNetwork, accuracy: float, cached: Path) -> None:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as part:
            save_file(network.state_dict(), part, {"accuracy": json.dumps(accuracy)})
    except (OSError, SafetensorError):
        pass  # it is trained anew next time


def _seeded(channels: int, num_classes: int) -> SmallNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return SmallNetwork(channels, num_classes)
