"""Bulk sampling: `python workflows/generate.py --model sampler.onnx --num-samples 50000 --output samples`."""

from collections.abc import Sequence
from pathlib import Path

from export.cli import add_sampling_flags, sampling_options
from export.parser import OneLineParser
from workflows.cli.process import run
from workflows.environment import set_defaults


def main(arguments: Sequence[str], prog: str = "generate.py") -> int:
    """Draw samples from command-line arguments and return the exit status; `prog` is the name in the help."""
    parser = OneLineParser(
        prog=prog,
        description="Draw many samples from a sampler.onnx, on all CPU cores or GPUs of a machine or a "
        "cluster. To resume after an interruption, run the same command again.",
    )
    parser.add_argument("--model", type=Path, required=True, help="ONNX file to sample from")
    parser.add_argument("--num-samples", type=int, required=True, help="number of samples in total")
    parser.add_argument(
        "--output",
        required=True,
        help="folder or bucket for .npy files; NAME.parquet is a folder of Parquet files",
    )
    parser.add_argument(
        "--num-actors", type=int, help="concurrent sessions; default: one per GPU, or per CPU core"
    )
    parser.add_argument(
        "--block-size", type=int, help="samples per file; default: up to 1024, fewer if they are large"
    )
    add_sampling_flags(parser)
    parser.add_argument("--verbose", action="store_true", help="show Ray's logs")
    options = parser.parse_args(arguments)
    set_defaults(options.verbose)

    from workflows.bulk_sampling import (  # takes seconds, so only after the arguments are checked
        SamplingOptions,
        generate,
    )

    return generate(
        options.model,
        options.output,
        options.num_samples,
        SamplingOptions(**sampling_options(options)),
        provider=options.provider,
        num_actors=options.num_actors,
        block_size=options.block_size,
        verbose=options.verbose,
    )


if __name__ == "__main__":
    run(main, extra="train")
