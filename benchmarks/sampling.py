"""The model that all sample from, and how their samples are timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contender import CPU_SECONDS, SECONDS, Figures, Measure, timed

RATE, CPU_MS = "samples/s", "CPU ms per sample"
_SECONDS_A_MEASUREMENT = 1.0


def samples_per_second(draw: Callable[[], object], batch_size: int) -> Measure:
    """A measure of as many batches as take a second, after a first one and another that is timed for that."""
    draw()
    batches = max(1, round(_SECONDS_A_MEASUREMENT / timed(draw)[SECONDS]))

    def measure() -> Figures:
        figures = timed(lambda: [draw() for _ in range(batches)])
        count = batches * batch_size
        return {RATE: count / figures[SECONDS], CPU_MS: 1e3 * figures[CPU_SECONDS] / count}

    return measure


def sample_by_onnx_runtime(
    model: str,
    sampler: str,
    num_steps: int,
    batch_size: int | None,
    num_samples: int | None = None,
    device: str = "cpu",
) -> Measure:
    """Calls of `export.sampler.Sampler.sample`, the first of which is over before.

    Args:
        model: path of a sampler.onnx.
        sampler, num_steps, batch_size: as for `Sampler.sample`.
        num_samples: samples of a call; by default one batch.
        device: "cpu" or "cuda".
    """
    from export.sampler import Sampler

    opened, count = Sampler(model, "cuda" if device == "cuda" else "cpu"), num_samples or batch_size or 1

    def draw() -> None:
        opened.sample(count, sampler=sampler, num_steps=num_steps, batch_size=batch_size)

    return samples_per_second(draw, count)


def export_diffusers_unet(path: Path) -> None:
    """Export the U-Net of `benchmarks.peers.diffusers_sampling` as a sampler.onnx, unchecked."""
    import torch

    from benchmarks.peers.diffusers_sampling import SIDE, unet
    from diffusion.config import Config
    from diffusion.data.dataset import DataSpec
    from diffusion.training.checkpoints import TrainedModel
    from export.exporter import onnx_model
    from export.torch_sampler import TorchSampler

    class Plain(torch.nn.Module):
        """The network as ours are called."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = unet()

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            return self.unet(x, t).sample

    spec = DataSpec(
        name="noise",
        kind="image",
        shape=(1, SIDE, SIDE),
        mean=[[[127.5]]],
        std=[[[127.5]]],
        range=(0.0, 255.0),
        columns=None,
        clip=(-1.0, 1.0),
        log_snr_window=(-8.0, 5.0),
        fingerprint="0" * 64,
    )
    config = Config().with_values({"schedule.num_train_timesteps": 100, "sampler.name": "ddim"})
    network = Plain().eval().requires_grad_(False)
    model = TorchSampler.of(TrainedModel(config, spec, network, {}))
    path.write_bytes(onnx_model(model).SerializeToString())
