"""Make every picture of the documentation: `make docs-pictures`.

    python -m docs.run_blocks --folder /tmp/docs docs/tutorial.md
    python -m docs.pictures --folder /tmp/docs

The folder is one in which the commands of the pages have run: it has a sweep over digits, one named hearts,
the model of docs/how-to/known-parts.md, and mlflow.db. Pages are photographed by Chromium, as in the tests.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.plots import image_grid, rows_of_images, save_animation
from export.sampler import Sampler

DOCS = Path(__file__).parent
_BROWSERS = ("chromium", "google-chrome")
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377")  # Paul Tol's, which the colour-blind can tell apart


def main(arguments: list[str]) -> int:
    """Make the pictures that the arguments name, by default all, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m docs.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PICTURE", help=f"{', '.join(PICTURES)}; default: all")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder of docs/run_blocks.py, with its runs"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(PICTURES):
        parser.error(f"{', '.join(sorted(unknown))}: no such picture")
    for name in options.names or PICTURES:
        PICTURES[name](options.folder.resolve(), DOCS / name)
        print(f"{DOCS / name}: {(DOCS / name).stat().st_size / 1000:.0f} kB")
    return 0


def digits(folder: Path, path: Path) -> None:
    """64 samples of the champion, by ONNX Runtime."""
    sampler = Sampler(digits_sweep(folder) / "champion" / "sampler.onnx")
    image_grid(sampler.sample(64, seed=0), sampler.spec.data["range"]).save(path, optimize=True)


def digits_animation(folder: Path, path: Path) -> None:
    """40 of them, as noise becomes digits: the estimate of the finished samples after every third call."""
    sampler = Sampler(digits_sweep(folder) / "champion" / "sampler.onnx")
    frames: list[Image.Image] = []

    def add(x0: NDArray[np.float32]) -> None:
        frame = image_grid(x0, sampler.spec.data["range"], cell=40, columns=10)
        frames.append(frame.quantize(16, dither=Image.Dither.NONE))

    sampler.sample(40, seed=0, sampler="ddim", num_steps=48, batch_size=40, on_preview=add)
    save_animation(frames[::3] + frames[-1:], path, duration_ms=120, hold_ms=2500)


def heart(folder: Path, path: Path) -> None:
    """Samples of the heart's champion, as the sweep drew them."""
    picture = Image.open(folder / "runs" / "hearts" / "champion" / "samples.png").convert("RGB")
    picture.resize((360, 360), Image.Resampling.LANCZOS).quantize(32).save(path, optimize=True)


def known_parts(folder: Path, path: Path) -> None:
    """A digit completed from its upper half, without and with resampling; first what is known."""
    sampler = known_digits(folder)
    known, mask = pixels(folder, "known"), pixels(folder, "mask") >= 8.0
    options: dict[str, Any] = {"sampler": "dpmpp_2m_sde", "num_steps": 20}
    rows = {
        f"resampling {number}": sampler.sample(9, known=known, mask=mask, resampling=number, **options)
        for number in (1, 5, 20)
    }
    shown = np.where(mask, 8.0, known)[None]
    frames = {title: np.concatenate([shown, samples]) for title, samples in rows.items()}
    save_rows(frames, sampler, path)


def varied(folder: Path, path: Path) -> None:
    """A digit, and what starts from it at several strengths."""
    sampler, image = known_digits(folder), pixels(folder, "known")
    rows = {
        f"strength {strength}": np.concatenate(
            [image[None], sampler.sample(9, start_from=image, strength=strength, num_steps=50)]
        )
        for strength in (0.2, 0.4, 0.6, 0.8)
    }
    save_rows(rows, sampler, path)


def between(folder: Path, path: Path) -> None:
    """Two digits, and the frames between them at several strengths."""
    sampler, first, last = known_digits(folder), pixels(folder, "known"), pixels(folder, "other")
    rows = {
        f"strength {strength}": np.concatenate(
            [first[None], sampler.interpolate(first, last, 8, strength=strength, num_steps=50), last[None]]
        )
        for strength in (0.3, 0.5, 0.7)
    }
    save_rows(rows, sampler, path)


def known_digits(folder: Path) -> Sampler:
    """The model of docs/how-to/known-parts.md."""
    return Sampler(folder / "runs" / "known-digits" / "model" / "sampler.onnx")


def pixels(folder: Path, name: str) -> NDArray[np.float64]:
    """An image of that page, [1, 8, 8] from 0 to 16."""
    return np.asarray(Image.open(folder / f"{name}.png").convert("L"))[None] / 255.0 * 16.0


def save_rows(rows: Mapping[str, NDArray[np.floating]], sampler: Sampler, path: Path) -> None:
    """Save rows of 10 images, each below its title."""
    rows_of_images(rows, sampler.spec.data["range"], columns=10).quantize(32).save(path, optimize=True)


def by_command(folder: Path, path: Path) -> None:
    """What the command of README's table draws beside this picture; a training is not repeated."""
    lines = (DOCS.parent / "README.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| ") and f"(docs/{path.name})" in line)
    words = shlex.split(row.split("`")[1])
    trains = "--output" not in words
    if trains:
        drawn = folder / "runs" / words[words.index("--name") + 1] / "model" / "samples.png"
    else:
        drawn = folder / words[words.index("--output") + 1]
    if not (trains and drawn.exists()):
        subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True)
    picture = Image.open(drawn).convert("RGB").reduce(2 if trains else 1)  # a training draws more samples
    picture.quantize(32).save(path, optimize=True)


def report(folder: Path, path: Path) -> None:
    """The first screen of the report of the sweep over digits."""
    photograph((digits_sweep(folder) / "report.html").as_uri(), path, (1200, 900))


def mlflow(folder: Path, path: Path) -> None:
    """The page of the sweep over digits that `make ui` prints."""
    with served(folder, "digits") as page:
        photograph(page, path, (2200, 900), wait_ms=30_000)


def schedules(folder: Path, path: Path) -> None:
    """Log-SNR of the kinds of schedules, with T = 1000 and the default betas."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from diffusion.config import ScheduleConfig
    from diffusion.registry import SCHEDULES

    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    kinds = [
        kind for kind in SCHEDULES if kind not in ("constant", "quadratic")
    ]  # the latter is scaled_linear
    for kind, colour in zip(kinds, _COLOURS, strict=False):
        schedule = ScheduleConfig(kind=kind, num_train_timesteps=1000).build()
        t = np.arange(1, len(schedule.log_snr) + 1)
        finite = np.isfinite(schedule.log_snr)
        axis.plot(t[finite], schedule.log_snr[finite], label=kind, color=colour)
    axis.set(xlabel="timestep t", ylabel="log-SNR", xlim=(0, 1000), ylim=(-12, 10))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "digits.png": digits,
    "digits.gif": digits_animation,
    "heart.png": heart,
    "known-parts.png": known_parts,
    "varied.png": varied,
    "between.png": between,
    "guidance.png": by_command,
    "attention.png": by_command,
    "cascade.png": by_command,
    "completed.png": by_command,
    "conditional.png": by_command,
    "efficient.png": by_command,
    "report.png": report,
    "mlflow.png": mlflow,
    "schedules.png": schedules,
}


def digits_sweep(folder: Path) -> Path:
    """The newest finished sweep over digits."""
    found = [path.parents[1] for path in folder.glob("runs/digits*/champion/decision.json")]
    if not found:
        raise SystemExit(f"error: {folder} has no finished sweep over digits: run make docs-outputs")
    return max(found, key=lambda path: path.stat().st_mtime)


def photograph(page: str, path: Path, size: tuple[int, int], wait_ms: int = 5_000) -> None:
    """Save the first screen of a page as a picture of at most 256 colours.

    Args:
        page: its address.
        path: .png file.
        size: width and height of the window in pixels.
        wait_ms: time that the page's scripts get, as they see it.
    """
    browser = next((name for name in _BROWSERS if shutil.which(name)), None)
    if browser is None:
        raise SystemExit(f"error: pictures of pages need one of {', '.join(_BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "--hide-scrollbars"]
        command += [f"--virtual-time-budget={wait_ms}", f"--screenshot={profile}/picture.png", page]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        picture = Image.open(f"{profile}/picture.png").convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


@contextlib.contextmanager
def served(folder: Path, experiment: str) -> Iterator[str]:
    """The address that `python -m workflows.ui` prints for an experiment, while it serves a folder's runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "workflows.ui", "--port", str(port)]
    command += ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        page = next((line.split()[1] for line in server.stdout if line.startswith(f"{experiment}: ")), None)
        if page is None:
            raise SystemExit(f"error: python -m workflows.ui has printed no page of {experiment}")
        yield page
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
