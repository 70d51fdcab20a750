"""Checks the sampler on a GPU, in about ten minutes: `python -m benchmarks.gpu`.

Each check prints a line, "ok", "FAILED" or "not run", with what was measured; the last line counts the
failures, and the exit status is 1 if there are any. On a machine without CUDA it says so and ends with
status 3. `--device cpu` runs those checks that can be with the loop of a GPU on the CPU, to try the program.
Throughput beside diffusers is measured by `python -m benchmarks.run gpu`, which this runs last.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.sampling import export_diffusers_unet
from diffusion.errors import InputError
from diffusion.registry import SAMPLERS
from export.gpu_loop import DeviceLoopCache, with_step
from export.limits import Cancelled
from export.noise import normal_noise
from export.sampler import Sampler
from export.session import DeviceOptions, cuda_unavailable_reason, open_session

TOLERANCE = 1e-4  # standard deviations, CPU to GPU
STEPS = 10


class Checks:
    """The checks of one device.

    Args:
        file: bytes of a sampler.onnx.
        device: "cuda", or "cpu" to try the checks themselves.
        batch_size: images of a large batch.
    """

    def __init__(self, file: bytes, device: str, batch_size: int) -> None:
        self.file, self.device, self.batch_size = file, device, batch_size
        self.cpu = Sampler(file, "cpu")
        self.gpu = self.open()
        self.failures = 0

    def open(self, **options: object) -> Sampler:
        """A sampler on the device, with options of `DeviceOptions`."""
        choices = DeviceOptions(**options)  # type: ignore[arg-type]
        if self.device == "cuda":
            return Sampler(self.file, "cuda", device_options=choices)
        sampler, spec = Sampler(self.file, "cpu"), self.cpu.spec
        content = with_step(self.file, labelled=bool(spec.classes))
        session, _ = open_session(content, "cpu")
        sampler._engine._gpu_loops = DeviceLoopCache(
            content, session, spec.shape, labelled=bool(spec.classes), device="cpu", options=choices
        )
        return sampler

    def check(self, name: str, run: Callable[[], tuple[bool, str]]) -> None:
        """Run one check and print what came of it; an exception is a failure."""
        started = time.perf_counter()
        try:
            passed, text = run()
        except Exception as error:  # whatever a GPU's libraries raise
            passed, text = False, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        self.failures += not passed
        seconds = time.perf_counter() - started
        print(f"{'ok' if passed else 'FAILED':<8}{name}: {text} ({seconds:.1f} s)", flush=True)

    def difference(self, drawn_by: Sampler, count: int = 4, **choices: object) -> float:
        """Largest difference of samples from the CPU's, in standard deviations."""
        options = {"num_steps": STEPS, **choices}
        expected = self.cpu.sample(count, seed=3, **options)  # type: ignore[arg-type]
        actual = drawn_by.sample(count, seed=3, **options)  # type: ignore[arg-type]
        return float(np.abs(actual - expected).max() / expected.std())

    def parity(self) -> tuple[bool, str]:
        """Every sampler, by the size that is captured as CUDA graphs and by another."""
        for _ in range(2):
            self.gpu.sample(4, num_steps=2)
        worst = {
            name: max(self.difference(self.gpu, count, sampler=each) for each in SAMPLERS)
            for name, count in (("with CUDA graphs", 4), ("without", 5))
        }
        return max(worst.values()) <= TOLERANCE, ", ".join(f"{k} {v:.1e}" for k, v in worst.items())

    def graphs(self) -> tuple[bool, str]:
        """Whether graphs were captured and noise was made on the device."""
        loops = self.gpu._engine._gpu_loops
        if loops is None:
            return False, "the loop is not on the device"
        self.gpu.sample(self.batch_size, num_steps=2, sampler="ddpm", batch_size=self.batch_size)
        return loops.graph_error is None and loops.noise_error is None, self.gpu.runs_on

    def large_noise(self) -> tuple[bool, str]:
        """The noise of a large batch, made on the device, gives the samples of a small one."""
        options = {"num_steps": 4, "sampler": "ddpm", "seed": 1}
        large = self.gpu.sample(self.batch_size, batch_size=self.batch_size, **options)[:4]  # type: ignore[arg-type]
        expected = self.cpu.sample(4, **options)  # type: ignore[arg-type]
        error = float(np.abs(large - expected).max() / expected.std())
        return error <= TOLERANCE, f"largest difference {error:.1e}"

    def threads(self) -> tuple[bool, str]:
        """Eight threads, two samplers, sizes that are captured meanwhile."""
        samplers, sizes = [self.gpu, self.open()], (1, 2, 3, 4)
        expected = {size: self.cpu.sample(size, seed=5, num_steps=STEPS) for size in sizes}

        def draw(index: int) -> float:
            size = sizes[index % len(sizes)]
            samples = samplers[index % 2].sample(size, seed=5, num_steps=STEPS)
            return float(np.abs(samples - expected[size]).max() / expected[4].std())

        with ThreadPoolExecutor(8) as pool:
            worst = max(pool.map(draw, range(48)))
        return worst <= TOLERANCE, f"48 requests, largest difference {worst:.1e}; {self.gpu.runs_on}"

    def limits(self) -> tuple[bool, str]:
        """A time limit and `stop`, while another request holds the device."""
        stop_other, late = threading.Event(), []
        long = {"num_steps": self.cpu.spec.noise_schedule.num_train_timesteps, "sampler": "ddpm"}

        def hold() -> None:
            try:
                while True:
                    self.gpu.sample(self.batch_size, stop=stop_other, **long)  # type: ignore[arg-type]
            except Cancelled:
                pass

        holder = threading.Thread(target=hold)
        holder.start()
        time.sleep(1.0)
        try:
            for kind in ("time_limit", "stop"):
                stop = threading.Event()
                threading.Timer(0.3, stop.set).start()
                ends = {"time_limit": 0.3} if kind == "time_limit" else {"stop": stop}
                started = time.perf_counter()
                try:
                    self.gpu.sample(64, **long, **ends)  # type: ignore[arg-type]
                except (InputError, Cancelled):
                    late.append(time.perf_counter() - started - 0.3)
        finally:
            stop_other.set()
            holder.join()
        text = ", ".join(f"{seconds * 1e3:.0f} ms" for seconds in late)
        return len(late) == 2 and max(late) < 0.3, f"late by {text}"

    def out_of_memory(self) -> tuple[bool, str]:
        """With too little memory for the batch it is halved, and the samples are the same."""
        limit = 600_000_000
        sampler = self.open(memory_limit=limit)
        options = {"num_steps": 2, "seed": 1}
        samples = sampler.sample(2048, batch_size=2048, **options)  # type: ignore[arg-type]
        expected = self.cpu.sample(4, **options)  # type: ignore[arg-type]
        error = float(np.abs(samples[:4] - expected).max() / expected.std())
        return error <= TOLERANCE, f"2,048 images in {limit / 1e6:.0f} MB, largest difference {error:.1e}"

    def tf32(self) -> tuple[bool, str]:
        """What TF32 changes, which is why it is off."""
        sampler = self.open(tf32=True)
        return (
            "TF32" in sampler.runs_on,
            f"moves samples by {self.difference(sampler):.1e}; {sampler.runs_on}",
        )

    def weights(self) -> tuple[bool, str]:
        """Memory of the GPU after many batch sizes: at most two copies of the weights and the buffers."""
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]

        def used() -> int:
            return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)

        sampler, before = self.open(), used()
        for size in (1, 2, 3, 4, 5, 6, 7, 8):
            for _ in range(3):
                sampler.sample(size, num_steps=2)
        grown = used() - before
        limit = 2 * len(self.file) / 1e6 + 1000.0
        return grown <= limit, f"grew by {grown} MB (limit {limit:.0f} MB) over 8 batch sizes"

    def speed(self) -> tuple[bool, str]:
        """Images per second for each batch size, and the noise of one row by numpy."""
        rates = []
        for size in sorted({1, 16, 64, self.batch_size}):
            run = {"num_steps": 50, "sampler": "ddim", "batch_size": size}
            for _ in range(2):  # opens, then captures
                self.gpu.sample(size, **{**run, "num_steps": 2})  # type: ignore[arg-type]
            started = time.perf_counter()
            self.gpu.sample(size, **run)  # type: ignore[arg-type]
            rates.append(f"batch {size} {size / (time.perf_counter() - started):.1f}/s")
        started = time.perf_counter()
        normal_noise(0, np.arange(512), 1, (3, 32, 32))
        milliseconds = 1e3 * (time.perf_counter() - started)
        return (
            True,
            f"50 steps of ddim: {', '.join(rates)}; noise of 512x3x32x32 by numpy {milliseconds:.0f} ms",
        )


def main() -> int:
    """Run the checks, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch-size", type=int, default=512, help="images of a large batch")
    parser.add_argument("--without-diffusers", action="store_true", help="leave out benchmarks.run gpu")
    options = parser.parse_args()
    reason = cuda_unavailable_reason() if options.device == "cuda" else None
    if reason is not None:
        print(f"not run: {reason}")
        return 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sampler.onnx"
        export_diffusers_unet(path)
        checks = Checks(path.read_bytes(), options.device, options.batch_size)
    print(
        f"U-Net of diffusers, {list(checks.cpu.spec.shape)}, {len(checks.file) / 1e6:.1f} MB; "
        f"{checks.gpu.runs_on}"
    )
    names = ["parity", "graphs", "large_noise", "threads", "limits"]
    # The others are about a GPU's memory and arithmetic.
    names += ["out_of_memory", "tf32", "weights"] if options.device == "cuda" else []
    for name in (*names, "speed"):
        checks.check(name.replace("_", " "), getattr(checks, name))
    print(f"{checks.failures} failures", flush=True)
    if options.device == "cuda" and not options.without_diffusers:
        subprocess.run([sys.executable, "-m", "benchmarks.run", "gpu"], check=False)
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
