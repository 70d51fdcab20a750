"""Which classes a conditional sampler is asked for. Needs numpy alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError

Labels = int | str | Sequence[int | str]


def chosen_labels(
    labels: Labels | None, num_samples: int, classes: Sequence[str], first_index: int = 0
) -> NDArray[np.int64] | None:
    """Label numbers, one a sample.

    Args:
        labels: a class's number or name for all samples, or one for each; None is every class in turn.
        num_samples: how many.
        classes: names by number; none where the model is unconditional.
        first_index: of the first sample; sample i has class i modulo their number where they take turns.

    Returns:
        int64 [num_samples], or None for an unconditional model.

    Raises:
        InputError: labels for an unconditional model, an unknown class, or another number of them.
    """
    if not classes:
        if labels is not None:
            raise InputError(f"labels {labels!r}: this model knows no classes; leave them out")
        return None
    if labels is None:
        return np.arange(first_index, first_index + num_samples) % len(classes)
    each = [labels] * num_samples if isinstance(labels, int | str) else list(labels)
    if len(each) != num_samples:
        raise InputError(f"{len(each)} labels for {num_samples} samples: give one, or one for each sample")
    return np.array([_number(label, classes) for label in each], dtype=np.int64)


def network_labels(
    labels: NDArray[np.int64] | None, null_label: int, *, guided: bool
) -> NDArray[np.int64] | None:
    """What y is in one call of the network: guided, the null labels first and then the classes.

    Args:
        labels: int64 [batch], or None of an unconditional model.
        null_label: the number of classes.
        guided: whether each sample goes through the network without its class as well.
    """
    if labels is None or not guided:
        return labels
    return np.concatenate([np.full_like(labels, null_label), labels])


def _number(label: int | str, classes: Sequence[str]) -> int:
    """A name goes before a number: classes may be named by numbers."""
    if isinstance(label, str):
        if label in classes:
            return list(classes).index(label)
    elif 0 <= int(label) < len(classes):
        return int(label)
    some = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise InputError(f"label {label!r}: give a class's name ({some}) or number (0 to {len(classes) - 1})")
