import gc

import torch

from diffusion.evaluation.once import once


def test_a_value_is_computed_once_for_the_same_tensors_and_key():
    x, y, calls = torch.zeros(3), torch.zeros(3), []

    def count():
        calls.append(1)
        return len(calls)

    assert once(x, "a", count) == once(x, "a", count) == 1
    assert once(x, "b", count) == 2, "another key"
    assert once(torch.zeros(3), "a", count) == 3, "an equal tensor is another one"
    assert once(x, "a", count, other=y) == once(x, "a", count, other=y) == 4
    assert once(x, "a", count, other=torch.zeros(3)) == 5
    y += 1.0
    assert once(x, "a", count, other=y) == 6, "the other tensor has changed"
    x += 1.0
    assert once(x, "a", count) == 7


def test_a_value_is_forgotten_with_its_tensor():
    class Value:
        alive = 0

        def __init__(self):
            Value.alive += 1

        def __del__(self):
            Value.alive -= 1

    x = torch.zeros(3)
    once(x, "value", Value)
    gc.collect()
    assert Value.alive == 1
    del x
    gc.collect()
    assert Value.alive == 0
