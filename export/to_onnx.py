"""Exports a trained model: `python -m export.to_onnx runs/NAME/champion --output sampler.onnx`.

The file is written only if its outputs agree with PyTorch's. This module has the command alone, and loads
`export.exporter`, whose names it passes on, when it has something to export.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from diffusion.errors import InputError
from diffusion.files import replacing
from export.contract import Precision
from export.output import check_output
from export.parser import OneLineParser

if TYPE_CHECKING:
    from export.exporter import OPSET as OPSET
    from export.exporter import ParityError as ParityError
    from export.exporter import denoiser_graph as denoiser_graph
    from export.exporter import export_onnx as export_onnx
    from export.exporter import export_whole_loop as export_whole_loop
    from export.exporter import onnx_model as onnx_model
    from export.exporter import sampler_spec as sampler_spec
else:
    from diffusion.lazy import lazy_names

    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "export.exporter": """
                OPSET ParityError denoiser_graph export_onnx export_whole_loop onnx_model sampler_spec
            """
        },
    )


def main(arguments: Sequence[str] | None = None, prog: str = "python -m export.to_onnx") -> int:
    """Run the command line, which exports one model folder, and return the exit status.

    Args:
        arguments: command-line arguments; None: those of the process.
        prog: name of the command in its help.
    """
    parser = OneLineParser(prog=prog, description="Export a trained model to ONNX.")
    parser.add_argument("model", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("--output", type=Path, help="default: sampler.onnx, or whole-loop.onnx")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="fp16: store the weights in 16 bits, which halves the file",
    )
    parser.add_argument(
        "--whole-loop",
        action="store_true",
        help="write a file that draws finished samples in one call of ONNX Runtime, in any language, instead "
        "of one for export.sampler: see docs/whole-loop.md",
    )
    parser.add_argument(
        "--in-graph-noise",
        action="store_true",
        help="with --whole-loop: the file makes the noise of a seed itself",
    )
    parser.add_argument(
        "--required-inputs",
        action="store_true",
        help="with --whole-loop: table, guidance_scale and first_index have no default values, which ONNX "
        "Runtime's JavaScript and Java cannot override",
    )
    options = parser.parse_args(arguments)
    loop_options = {name: getattr(options, name) for name in ("in_graph_noise", "required_inputs")}
    if any(loop_options.values()) and not options.whole_loop:
        parser.error("--in-graph-noise, --required-inputs: give --whole-loop too")
    if options.output is None:
        options.output = Path("whole-loop.onnx" if options.whole_loop else "sampler.onnx")
    # Not before the arguments are known to be right: this takes seconds.
    from diffusion.training.checkpoints import TrainedModel
    from export import exporter

    try:
        check_output(options.output)
        model = TrainedModel.load(options.model)
        content, cases = exporter.export_onnx(model, options.precision)
        note = exporter.compare_samples(model, content, cases)
        if options.whole_loop:
            content, loop_cases = exporter.export_whole_loop(content, **loop_options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except exporter.ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        with replacing(options.output) as part:
            part.write_bytes(content)
    except OSError as error:
        print(
            f"error: --output {options.output} cannot be written ({error.strerror}): choose another path",
            file=sys.stderr,
        )
        return 2
    worst = max(case.max_abs_error / max(case.output_scale, 1e-6) for case in cases)
    print(f"{options.output}: {len(content) / 1e6:.2f} MB, {len(cases)} comparisons with PyTorch passed")
    print(f"largest difference: {worst:.1e}, relative to the largest output")
    if note:
        print(note)
    if options.whole_loop:
        worst = max(case.max_abs_error for case in loop_cases)
        print(
            f"whole loop: {len(loop_cases)} comparisons with export.sampler passed, largest difference "
            f"{worst:.1e} standard deviations of the data"
        )
        return 0
    then = "" if model.config.data.low_resolution is None else "FIRST.onnx --then "
    print(f"next: python -m export.sampler {then}{options.output} --output samples.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        print(f"error: this command needs {error.name}: pip install 'ray-ddpm[train]'", file=sys.stderr)
        sys.exit(2)
