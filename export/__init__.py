# ruff: noqa: I001  (sorting would put every name on a line of its own)
"""Writing `sampler.onnx` (`export_onnx`), checking it, and drawing samples (`Sampler`, `Cascade`)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.cascade import Cascade as Cascade
    from export.limits import Cancelled as Cancelled
    from export.parity import ParityCase as ParityCase, ParityError as ParityError
    from export.sampler import Preview as Preview, Sampler as Sampler
    from export.to_onnx import export_onnx as export_onnx, export_whole_loop as export_whole_loop
else:
    from diffusion.lazy import lazy_names

    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "export.cascade": "Cascade",
            "export.limits": "Cancelled",
            "export.parity": "ParityCase ParityError",
            "export.sampler": "Preview Sampler",
            "export.to_onnx": "export_onnx export_whole_loop",
        },
    )
