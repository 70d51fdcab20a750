import numpy as np
import pytest

from diffusion.errors import InputError
from export.labels import chosen_labels

DIGITS = [str(digit) for digit in range(10)]
ANIMALS = ["cat", "dog", "eel"]


def test_without_labels_every_class_comes_in_turn():
    np.testing.assert_array_equal(chosen_labels(None, 7, ANIMALS), [0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize("label", ["dog", 1, ["dog", 1, "dog"]])
def test_a_class_is_meant_by_its_name_or_its_number(label):
    np.testing.assert_array_equal(chosen_labels(label, 3, ANIMALS), [1, 1, 1])


def test_a_name_goes_before_a_number():
    classes = ["2", "0", "1"]
    np.testing.assert_array_equal(chosen_labels(["0", 0], 2, classes), [1, 0])


def test_an_unconditional_model_has_no_labels():
    assert chosen_labels(None, 3, []) is None
    with pytest.raises(InputError, match="knows no classes"):
        chosen_labels(1, 3, [])


@pytest.mark.parametrize(
    ("labels", "words"), [("cow", "cat, dog, eel"), (3, "0 to 2"), (-1, "0 to 2"), ([1, 2], "2 labels for 3")]
)
def test_labels_that_mean_nothing_are_one_line(labels, words):
    with pytest.raises(InputError, match=words) as caught:
        chosen_labels(labels, 3, ANIMALS)
    assert "\n" not in str(caught.value)
