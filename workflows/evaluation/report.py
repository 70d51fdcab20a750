"""The results of `ray-ddpm evaluate`: lines for the terminal, a page in HTML, and JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.data.dataset import Dataset
from diffusion.evaluation.distances import Estimate
from diffusion.files import replacing
from diffusion.metrics import AUC, DISTANCE, FLOOR, NUM_HELDOUT, NUM_REFERENCE, NUM_SAMPLES, STANDARD_ERROR
from diffusion.plots import draw_samples, samples_per_picture
from workflows.evaluation.judge import Judged
from workflows.publishing.embedding import encoded
from workflows.publishing.formatting import with_error
from workflows.publishing.model_card import copying_summary
from workflows.publishing.page import write_page

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_OTHER_DATA = (
    "Its model was trained on other data or another split, so these test examples may have been among its "
    "training examples, and nothing is said about copies."
)


def lines(judged: Sequence[Judged]) -> list[str]:
    """What was found, for a terminal of 80 columns."""
    metrics = judged[0].metrics
    result = [
        f"{metrics[NUM_SAMPLES]:.0f} samples of each, compared with {metrics[NUM_REFERENCE]:.0f} examples, "
        f"{metrics[NUM_HELDOUT]:.0f} of them held out",
        "",
        f"{'distance':>20}{'auc':>20}",
    ]
    for each in judged:
        cells = "".join(f"{_with_error(each.metrics, name):>20}" for name in (DISTANCE, AUC))
        result.append(f"{cells}  {each.candidate.name}")
    floors = "".join(f"{_with_error(metrics, name, FLOOR):>20}" for name in (DISTANCE, AUC))
    result += [f"{floors}  as many training examples", ""]
    for each in judged:
        if each.from_best:
            result.append(f"{each.candidate.name}: {each.outcome} ({_differences(each)})")
        result.append(f"{each.candidate.name}: {_copying(each)}")
    return result


def write_report(judged: Sequence[Judged], dataset: Dataset, path: Path) -> Path:
    """Write the page, and the same values beside it as .json; returns the path of the latter.

    Args:
        judged: the candidates, best first.
        dataset: the data that they were compared with.
        path: path of the page.
    """
    metrics = judged[0].metrics
    names = [name for name in metrics if not name.endswith((STANDARD_ERROR, FLOOR))]
    write_page(
        path,
        _TEMPLATE,
        data_name=dataset.spec.name,
        judged=judged,
        num_samples=f"{metrics[NUM_SAMPLES]:.0f}",
        num_reference=f"{metrics[NUM_REFERENCE]:.0f}",
        verdicts=[(each, _differences(each), _copying(each)) for each in judged],
        pictures=[
            ("examples of the data", _picture(dataset, dataset.raw(dataset.test[:]))),
            *((each.candidate.name, _picture(dataset, each.candidate.samples)) for each in judged),
        ],
        rows=[
            (
                name,
                [
                    *(_with_error(each.metrics, name) for each in judged),
                    _with_error(metrics, name, FLOOR),
                ],
            )
            for name in names
        ],
    )
    json_path = path.with_suffix(".json")
    with replacing(json_path) as part:
        part.write_text(json.dumps(_tree(judged, dataset), indent=2) + "\n")
    return json_path


def _tree(judged: Sequence[Judged], dataset: Dataset) -> dict[str, Any]:
    """Plain values for JSON; numbers that are not finite become None."""
    tree = {
        "data": {"name": dataset.spec.name, "fingerprint": dataset.spec.fingerprint},
        "candidates": [
            {
                "name": each.candidate.name,
                "outcome": each.outcome,
                "copying": each.verdict,
                "minus_best": {
                    name: {"value": value.value, "standard_error": value.standard_error}
                    for name, value in each.from_best.items()
                },
                "metrics": dict(each.metrics),
            }
            for each in judged
        ],
    }
    plain: dict[str, Any] = json.loads(json.dumps(tree), parse_constant=lambda _: None)
    return plain


def _copying(each: Judged) -> str:
    return _OTHER_DATA if each.verdict is None else copying_summary(each.metrics, prefix="")


def _differences(each: Judged) -> str:
    return ", ".join(f"{name} {_in_errors(value)}" for name, value in each.from_best.items())


def _in_errors(difference: Estimate) -> str:
    if not (math.isfinite(difference.value) and difference.standard_error > 0.0):
        return f"{difference.value:+.3g}"
    errors = abs(difference.value) / difference.standard_error
    return f"{difference.value:+.3g}, {errors:.1f} standard errors"


def _with_error(metrics: Mapping[str, float], name: str, suffix: str = "") -> str:
    """A value and its standard error; empty if there is none."""
    value, error = metrics.get(name + suffix), metrics.get(name + suffix + STANDARD_ERROR)
    return with_error(value, error, missing="" if value is None else f"{value:g}")


def _picture(dataset: Dataset, samples: NDArray[np.float64]) -> str:
    """A data URI of a picture of samples."""
    shown = samples[: samples_per_picture(dataset.spec.kind)]
    limits = None
    if dataset.spec.kind == "points":
        points = dataset.raw(dataset.test[:])[:, :2]
        (x_min, y_min), (x_max, y_max) = points.min(axis=0), points.max(axis=0)
        limits = (float(x_min), float(x_max), float(y_min), float(y_max))
    return encoded(draw_samples(shown, dataset.spec.range, limits))
