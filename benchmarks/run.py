"""Measure ours beside its peers: `make bench`.

    python -m benchmarks.run                    # all but demo: about two hours on 2 cores
    python -m benchmarks.run heart deployment   # single ones

Writes benchmarks/results/NAME.md and the rows of benchmarks/results/summary.csv. What is not here, hardware,
a package or data, is a row that says "not measured". docs/benchmarks.md tells how to read the table.
"""

import argparse
import sys
import time
import traceback
from importlib import import_module

from benchmarks.comparison import Options
from benchmarks.options import at_least_one, one_of
from benchmarks.table import RESULTS, write_summary

NAMES = (
    "heart",
    "mnist_mlp",
    "unet_training",
    "deployment",
    "sampler_quality",
    "workers",
    "sweep",
    "startup",
    "growth",
    "gpu",
    "demo",
)
BY_NAME_ONLY = ("demo",)  # an hour and more


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that are named, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", type=one_of(NAMES), metavar="NAME", help=f"any of {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--repeats", type=at_least_one, default=5, help="measurements of each contender (default: 5)"
    )
    parser.add_argument("--mnist", default="mnist", help="folder of MNIST's images (default: downloaded)")
    options = parser.parse_args(arguments)
    modules = {name: import_module(f"benchmarks.comparisons.{name}") for name in NAMES}
    failed: list[str] = []
    order = [work for module in modules.values() for work in module.WORKS]
    for name in options.names or [each for each in NAMES if each not in BY_NAME_ONLY]:
        module, started = modules[name], time.monotonic()
        try:
            report = module.run(Options(options.repeats, options.mnist))
        except Exception:  # hours of other measurements must not be lost to one
            traceback.print_exc()
            failed.append(name)
            continue
        text = module.__doc__.partition("\n\n")[2].strip()
        page = RESULTS / f"{name}.md"
        page.write_text(
            report.page(module.TITLE, f"`python -m benchmarks.run {name}`. {text}", options.repeats)
        )
        write_summary(report.rows, order)
        print(f"{page}: {len(report.rows)} rows in {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        print(f"failed, with the reasons above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
