"""Sampling speed of the same U-Net in diffusers' pipeline, with torch.compile, and as sampler.onnx.

    python -m benchmarks.deployment            # about ten minutes on 2 cores
    python -m benchmarks.deployment --device cuda

diffusers' UNet2DModel with random weights is exported by export.to_onnx, so that all contenders compute the
same function: 50 steps of DDIM. Each contender runs in its own process, since ONNX Runtime's threads and
torch's compete for the cores. Writes benchmarks/results/deployment-DEVICE.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "deployment.md"
SIDE, STEPS, ROUNDS = 32, 50, 3
BATCHES = {"cpu": (1, 16, 64), "cuda": (1, 16, 64, 512)}
CONTENDERS = {
    "diffusers": "diffusers DDIMPipeline",
    "compile": "diffusers DDIMPipeline, torch.compile",
    "onnx": "sampler.onnx",
}


def unet():  # type: ignore[no-untyped-def]
    """A UNet2DModel with 1.1M parameters for images of shape 1x32x32."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()


def export(path: Path) -> int:
    """Export the U-Net as a sampler.onnx and return its number of parameters."""
    import torch

    from diffusion.config import Config
    from diffusion.data.dataset import DataSpec
    from diffusion.training.checkpoints import TrainedModel
    from export.to_onnx import export_onnx

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet()

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
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
    config = Config().with_values(
        {"schedule.num_train_timesteps": 100, "sampler.name": "ddim", "sampler.num_steps": STEPS}
    )
    network = Plain().eval().requires_grad_(False)
    path.write_bytes(export_onnx(TrainedModel(config, spec, network, {}))[0])
    return sum(weight.numel() for weight in network.parameters())


def contender(name: str, device: str, path: Path) -> Callable[[int], object]:
    """A function batch -> images to be timed."""
    if name == "onnx":
        from export.sampler import Sampler

        sampler = Sampler(path, provider="cuda" if device == "cuda" else "cpu")
        return lambda batch: sampler.sample(batch, num_steps=STEPS, batch_size=batch)
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler

    model = unet().to(device)
    if name == "compile":
        model = torch.compile(model)
    pipeline = DDIMPipeline(model, DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def draw(batch: int) -> object:
        return pipeline(batch_size=batch, num_inference_steps=STEPS, output_type="np").images

    return draw


def measure(name: str, device: str, path: Path, batch: int) -> None:
    """Print the seconds per batch as JSON, after a warm-up; runs in its own process."""
    draw = contender(name, device, path)
    for _ in range(3 if device == "cuda" else 1):  # compiled, captured
        draw(batch)
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        draw(batch)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds))


def in_process(name: str, device: str, path: Path, batch: int) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.deployment", "--device", device]
    command += ["--measure", name, "--model", str(path), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.device, options.model, options.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sampler.onnx"
        num_parameters = export(path)
        rates: dict[str, dict[int, float]] = {name: {} for name in CONTENDERS}
        for batch in BATCHES[options.device]:
            for name in CONTENDERS:
                seconds = in_process(name, options.device, path, batch)
                rates[name][batch] = batch / statistics.median(seconds)
                print(name, batch, f"{rates[name][batch]:.2f} images/s", flush=True)
    text = report(rates, num_parameters, options.device)
    RESULTS.with_stem(f"deployment-{options.device}").write_text(text)
    print(text)


def report(rates: dict[str, dict[int, float]], num_parameters: int, device: str) -> str:
    batches = list(rates["onnx"])
    lines = [
        f"# Images a second on {'the processor' if device == 'cpu' else 'a GPU'}",
        "",
        f"{STEPS} steps of DDIM, UNet2DModel of {num_parameters / 1e6:.1f}M parameters, 1x{SIDE}x{SIDE}, "
        f"fp32; {os.cpu_count()} cores, {platform.machine()}. Median of {ROUNDS} after a warm-up, each "
        "contender in a process of its own; in brackets times diffusers' eager pipeline. "
        "`python -m benchmarks.deployment`.",
        "",
        "| | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for name, label in CONTENDERS.items():
        cells = [f"{rates[name][b]:.2f} (x{rates[name][b] / rates['diffusers'][b]:.2f})" for b in batches]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
