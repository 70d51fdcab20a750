"""The table of samplers by cost."""

from benchmarks.samplers_by_cost import table


def test_cells_stand_below_their_network_evaluations():
    """Two-stage samplers, which have an odd number, below the even one after it."""
    found = {
        "logsnr ddim 20": {"distance": (0.03, 0.002), "auc": (0.76, 0.014)},
        "karras heun 19": {"distance": (0.0123, 0.002), "auc": (0.679, 0.017)},
        "logsnr ddim 50": {"distance": (0.018, 0.002), "auc": (0.73, 0.015)},
    }
    assert table(found) == [
        "| sampler | spacing | 20 | 50 |",
        "|---|---|---|---|",
        "| ddim | logsnr | 0.760 / 0.03 | 0.730 / 0.018 |",
        "| heun | karras | 0.679 / 0.0123 |  |",
        "",
        "Standard error of an AUC: at most 0.017.",
    ]
