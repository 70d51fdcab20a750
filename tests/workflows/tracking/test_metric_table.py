"""Metrics with their errors and floors as one table."""

import math

from hypothesis import given
from hypothesis import strategies as st

from diffusion.metrics import is_detail
from workflows.tracking.metric_table import metric_table, table_metrics


def test_errors_and_floors_stand_beside_their_metric():
    metrics = {
        "sample/auc": 0.7,
        "sample/auc_se": 0.01,
        "sample/auc_floor": 0.5,
        "sample/auc_floor_se": 0.02,
        "sample/num_samples": 100.0,
        "val/elbo_window_paired_se": 0.1,
    }
    table = metric_table(metrics)
    assert table["columns"][0] == "metric" and len(table["columns"]) == 5
    assert table["data"] == [
        ["sample/auc", 0.7, 0.01, 0.5, 0.02],
        ["sample/num_samples", 100.0, None, None, None],
        ["val/elbo_window_paired_se", 0.1, None, None, None],
    ]
    assert [name for name in metrics if not is_detail(name)] == ["sample/auc"]


@given(
    st.dictionaries(
        st.builds(
            "".join, st.tuples(st.sampled_from("abc"), st.sampled_from(["", "_se", "_floor", "_floor_se"]))
        ),
        st.floats(),
    )
)
def test_every_finite_number_is_in_the_table_once(metrics):
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    table = metric_table(metrics)
    assert table_metrics(table) == finite
    assert sum(number is not None for row in table["data"] for number in row[1:]) == len(finite)
