"""Names of metrics, as MLflow, trials.csv and models' files have them, and the objectives made of them.

docs/extending.md tells how to add an objective.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

STANDARD_ERROR = "_se"  # suffix: the standard error of the metric before it
FLOOR = "_floor"  # suffix: the value for examples of the data in place of samples

OBJECTIVE: Final = "objective"  # what a sweep minimises: the value of `metrics.objective`
TRAIN_MSE = "train/mse"
LEARNING_RATE = "training/learning_rate"
BEST_UPDATE = "best_update"  # updates at the best evaluation so far, whose weights are the trained model
BEST_OBJECTIVE = "best_objective"  # its objective
RANK = "rank"  # place among the trials of a sweep that have a usable model, the finalists first

VAL_PREFIX = "val/"
VAL_MSE = "val/mse"
VAL_MSE_AT_LOG_SNR = "val/mse_at_log_snr_"  # followed by the log-SNR
VAL_ELBO_WINDOW = "val/elbo_window"
VAL_ELBO_WINDOW_PAIRED_SE = "val/elbo_window_paired_se"  # that of the difference to the best trial
VAL_BITS_PER_DIM = "val/bits_per_dim"
VAL_NATS_PER_DIM = "val/nats_per_dim"

# Of samples, without prefix.
DISTANCE = "distance"  # it and the next decide between models: see docs/judging.md
AUC = "auc"
KERNEL = "kernel"
NUM_SAMPLES = "num_samples"
NUM_REFERENCE = "num_reference"  # examples that they are compared with
NUM_HELDOUT = "num_heldout"  # those of them that no model was trained on
NETWORK_EVALUATIONS = "network_evaluations"  # of each sample
NN_TRAIN = "nn_train"
NN_HELDOUT = "nn_heldout"
NN_SE = "nn_se"
COPIED = "copied"
COPIED_P = "copied_p"  # p-value of the test for copies
COPIED_DETECTABLE = "copied_detectable"  # the smallest fraction of copies that it would find

SAMPLE_PREFIX = "sample/"
SAMPLE_DISTANCE = SAMPLE_PREFIX + DISTANCE
SAMPLE_AUC = SAMPLE_PREFIX + AUC
VAL_SAMPLE_PREFIX = "val/sample_"  # of a sweep's finalists: `sample/...` with fresh seeds

TEST_PREFIX = "test/"
TEST_MSE = "test/mse"
TEST_ELBO_WINDOW = "test/elbo_window"
TEST_SAMPLE_PREFIX = "test/sample_"

ALPHAS_CUMPROD_T = "schedule/alphas_cumprod_T"
LOG_SNR_MIN = "schedule/log_snr_min"
LOG_SNR_MAX = "schedule/log_snr_max"
PRIOR_KL = "schedule/prior_kl"
PRIOR_KL_TOTAL = "schedule/prior_kl_total"

FEATURES_ACCURACY = "features/accuracy"  # of the classifier whose features images are compared by
RUNG_SPEARMAN = "rung/spearman_at_"  # followed by the updates of the rung
SAMPLER_PREFIX = "sampler/"  # of the champion: distance and auc by sampler and network evaluations
FINAL_PREFIX = "final/"  # before every metric of a sweep's final training


_COUNTS_AND_LIMITS = (
    BEST_UPDATE,
    NUM_SAMPLES,
    NUM_REFERENCE,
    NUM_HELDOUT,
    NETWORK_EVALUATIONS,
    COPIED_P,
    COPIED_DETECTABLE,
)


def is_detail(name: str) -> bool:
    """Whether a metric only qualifies another one: its error, its floor, or a count behind it."""
    return name.endswith((STANDARD_ERROR, FLOOR, *_COUNTS_AND_LIMITS))


def with_prefix(metrics: Mapping[str, float], old: str, new: str) -> dict[str, float]:
    """The metrics whose names begin with `old`, with `new` in its place."""
    return {new + name.removeprefix(old): value for name, value in metrics.items() if name.startswith(old)}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A metric that a sweep ranks its trials by; the lowest value wins.

    Attributes:
        metric: name of the metric.
        higher_is_better: whether the metric is negated, because the best model has its highest value.
        needs_samples: whether every evaluation generates samples; otherwise only the last one does.
        warning: line to print before a sweep, or None.
    """

    metric: str
    higher_is_better: bool = False
    needs_samples: bool = False
    warning: str | None = None

    def value(self, metrics: Mapping[str, float]) -> float:
        """The value to minimise, from the metrics of an evaluation."""
        value = metrics[self.metric]
        return -value if self.higher_is_better else value


BY_ELBO_WINDOW = Objective(metric=VAL_ELBO_WINDOW)
BY_MSE = Objective(
    metric=VAL_MSE,
    warning=f"warning: {VAL_MSE} cannot be compared across schedules: a schedule that spends more steps at "
    f"high noise scores lower with a worse model. Leave out --objective to rank trials by {VAL_ELBO_WINDOW}.",
)
BY_SAMPLE_DISTANCE = Objective(metric=SAMPLE_DISTANCE, needs_samples=True)


def metrics_of_best(evaluations: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of the model that a training has made so far, that of its best evaluation.

    Args:
        evaluations: metrics of each evaluation by its number of updates. What only the last one has was
            computed for the best weights.
    """
    last = evaluations[max(evaluations)] if evaluations else {}
    return {**last, **evaluations.get(int(last.get(BEST_UPDATE, -1)), {})}
