"""Class labels of the samples of a conditional model. Needs only numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import InputError

Labels = int | str | Sequence[int | str]


def resolve_labels(
    labels: Labels | None, num_samples: int, classes: Sequence[str], first_index: int = 0
) -> NDArray[np.int64] | None:
    """Convert names and numbers of classes to one label per sample.

    Args:
        labels: name or number of one class for all samples, or one per sample. None cycles through the
            classes: sample i has label i modulo the number of classes.
        num_samples: number of samples.
        classes: class names, indexed by label; empty if the model is unconditional.
        first_index: index of the first sample.

    Returns:
        int64 [num_samples], or None for an unconditional model.

    Raises:
        InputError: labels are given for an unconditional model, a class is unknown, or the number of
            labels is neither 1 nor `num_samples`.
    """
    if not classes:
        if labels is not None:
            raise InputError(f"labels {labels!r}: this model has no classes; leave the labels out")
        return None
    if labels is None:
        return np.arange(first_index, first_index + num_samples) % len(classes)
    one_for_all = isinstance(labels, int | str | np.integer)
    label_list = [labels] * num_samples if one_for_all else _each(labels)
    if len(label_list) != num_samples:
        raise InputError(
            f"{len(label_list)} labels for {num_samples} samples: give one for all, or one per sample"
        )
    return np.array([_label_number(label, classes) for label in label_list], dtype=np.int64)


def network_labels(
    labels: NDArray[np.int64] | None, null_label: int, *, guided: bool
) -> NDArray[np.int64] | None:
    """Build the network's input y; with guidance, the null labels come first and then the classes.

    Args:
        labels: int64 [batch], or None for an unconditional model.
        null_label: the label that stands for no class, which is the number of classes.
        guided: whether each sample also goes through the network without its class.

    Returns:
        int64 [batch], or [2 * batch] with guidance; None for an unconditional model.
    """
    if labels is None or not guided:
        return labels
    return np.concatenate([np.full_like(labels, null_label), labels])


def _each(labels: Any) -> list[Any]:
    try:
        return list(labels)
    except TypeError as error:
        raise InputError(
            f"labels {labels!r}: give the name or number of a class, or one per sample"
        ) from error


def _label_number(label: Any, classes: Sequence[str]) -> int:
    """Look up a label. A string is always a name, since class names may look like numbers."""
    if isinstance(label, str):
        if label in classes:
            return list(classes).index(label)
    elif isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label < len(classes):
        return int(label)
    names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise InputError(
        f"label {label!r}: give the name of a class ({names}) or a number (0 to {len(classes) - 1})"
    )
