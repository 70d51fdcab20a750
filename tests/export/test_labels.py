import numpy as np
import pytest

from diffusion.errors import InputError
from export.labels import resolve_labels

DIGITS = [str(digit) for digit in range(10)]
ANIMALS = ["cat", "dog", "eel"]


def test_labels_cycle_through_the_classes_by_default():
    np.testing.assert_array_equal(resolve_labels(None, 7, ANIMALS), [0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize(
    "label", ["dog", 1, np.int64(1), ["dog", 1, "dog"], np.ones(3, dtype=np.uint8)], ids=str
)
def test_a_class_is_given_by_name_or_number(label):
    np.testing.assert_array_equal(resolve_labels(label, 3, ANIMALS), [1, 1, 1])


def test_a_string_is_a_name_even_if_it_looks_like_a_number():
    classes = ["2", "0", "1"]
    np.testing.assert_array_equal(resolve_labels(["0", 0], 2, classes), [1, 0])


def test_an_unconditional_model_has_no_labels():
    assert resolve_labels(None, 3, []) is None
    with pytest.raises(InputError, match="has no classes"):
        resolve_labels(1, 3, [])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("cow", "cat, dog, eel"), (3, "0 to 2"), (-1, "0 to 2"), ([1, 2], "2 labels for 3"),
        (1.5, "labels 1.5"), ([1, 1.5, 1], "label 1.5"), ([1, True, 1], "label True"), (True, "label True"),
    ],
)  # fmt: skip
def test_invalid_labels_give_a_one_line_error(labels, words):
    with pytest.raises(InputError, match=words) as caught:
        resolve_labels(labels, 3, ANIMALS)
    assert "\n" not in str(caught.value)
