"""Run the commands of the documentation, and write what they print into it: `make docs-outputs`.

    python -m docs.run_blocks --folder /tmp/docs docs/tutorial.md

All pages share a folder, so that a page can use the runs of the pages before. It is kept, and
`python -m docs.pictures` takes its pictures from it. Blocks that say `not run` are left out; docs/blocks.py
has the comments that tell what a block is.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from docs.blocks import ROOT, Block, pages, read_blocks, replace_text

# What commands may name, as in a checkout. Runs and MLflow's files are the folder's own.
_LINKED = (
    "Makefile benchmarks cluster constraints.txt diffusion docs examples export pyproject.toml "
    "ray_cluster.yaml tests workflows"
).split()
# `make` runs its commands in this environment instead of making another one.
_PRELUDE = """set -eo pipefail
make() { command make -o .venv/train.stamp -o .venv/test.stamp BIN="$(dirname "$PYTHON")" "$@"; }
"""
_LIMIT_SECONDS = 3 * 3600


def main(arguments: list[str]) -> int:
    """Run the blocks of the given pages, by default of all, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m docs.run_blocks", description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files; default: all")
    parser.add_argument("--folder", type=Path, required=True, help="where the commands run; made if missing")
    options = parser.parse_args(arguments)
    prepare(options.folder)
    failed = 0
    for path in [each.resolve() for each in options.pages] or pages():
        failed += run_page(path, options.folder.resolve())
    return int(failed > 0)


def prepare(folder: Path) -> None:
    """Make the folder with what the commands of the pages need: the code, and small data of one's own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _LINKED:
        link = folder / name
        if not link.exists():
            link.symlink_to(ROOT / name)
    write_example_data(folder)


def write_example_data(folder: Path) -> None:
    """Write photos/, a folder of images, and measurements.csv, a table: what a reader has of their own."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits, load_iris

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / "photos" / f"digit-{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((16, 16)).save(path)
    iris = load_iris(as_frame=True)
    table = iris.data.rename(columns=lambda name: name.removesuffix(" (cm)").replace(" ", "_"))
    table["species"] = iris.target.map(dict(enumerate(iris.target_names)))
    random = np.random.default_rng(0)
    rows = table.iloc[random.integers(len(table), size=3000)].reset_index(drop=True)
    rows.iloc[:, :4] += random.normal(scale=0.1, size=(3000, 4))
    rows["plant"] = np.arange(3000) // 3
    rows.round(3).to_csv(folder / "measurements.csv", index=False)


def run_page(path: Path, folder: Path) -> int:
    """Run the blocks of a page and rewrite what they print; returns the number of blocks that failed."""
    printed, failed, number = "", 0, 0
    while number < len(blocks := read_blocks(path)):
        block = blocks[number]
        number += 1
        if block.kind in ("printed by", "checked"):
            status, text = run_shell(block.note, folder)
        elif block.kind == "printed":
            replace_text(block, shorten(printed, block.note))
            continue
        elif block.is_shell and block.kind != "not run":
            status, printed = run_shell(block.text, folder)
        elif block.language == "python" and block.kind != "not run" and _is_executed(path):
            status, printed = run_python(block, folder)
        else:
            continue
        if block.kind in ("printed by", "checked"):
            replace_text(block, text)
        elif status:
            failed += 1
            print(f"{path.relative_to(ROOT)}:{block.line}: exit status {status}", file=sys.stderr)
    return failed


def _is_executed(path: Path) -> bool:
    """Whether the Python blocks of a page are programs; those of docs/extending.md are parts of a package."""
    return path.name not in ("extending.md", "onnx-format.md", "package.md")


def run_python(block: Block, folder: Path) -> tuple[int, str]:
    """Run a Python block as a program; returns its exit status and what it prints."""
    program = folder / ".block.py"
    program.write_text(block.text)
    return run_shell(f"python {program.name}", folder)


def run_shell(text: str, folder: Path) -> tuple[int, str]:
    """Run commands like a reader in a checkout; returns their exit status and what they print."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
    print(f"$ {text.strip()}", flush=True)
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", _PRELUDE + text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LIMIT_SECONDS,
    )
    print(f"{done.stdout}({time.monotonic() - start:.0f} s)", flush=True)
    return done.returncode, done.stdout.replace(f"{folder}/", "")


def shorten(text: str, note: str) -> str:
    """The part of an output that a note asks for: all of it, or its last lines.

    Raises:
        ValueError: the note asks for something else.
    """
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    if note:
        asked = re.fullmatch(r"last (\d+) lines", note)
        if not asked:
            raise ValueError(f"<!-- printed: {note} -->: write `last N lines`, or nothing after `printed`")
        lines = lines[-int(asked[1]) :]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
