"""The noise of `export.noise` as operators of an ONNX graph: the same words, and the same numbers."""

import math
from typing import Protocol

import numpy as np

from export.graph_builder import GraphBuilder
from export.noise import PARITY, ROTATIONS


class Words(Protocol):
    """How a graph computes with uint32 words, whose sums wrap around."""

    def xor(self, first: str, second: str) -> str:
        """Bitwise exclusive or."""

    def rotate(self, word: str, count: int) -> str:
        """Rotate to the left."""


class BitwiseWords:
    """By the operators of ONNX for bits, which ONNX Runtime has on the CPU only."""

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder

    def xor(self, first: str, second: str) -> str:
        return self._builder.op("BitwiseXor", first, second)

    def rotate(self, word: str, count: int) -> str:
        builder = self._builder
        left, right = (
            builder.op("BitShift", word, builder.constant(places, "uint32"), direction=direction)
            for direction, places in (("LEFT", count), ("RIGHT", 32 - count))
        )
        return builder.op("BitwiseOr", left, right)


class TableWords:
    """By arithmetic and a table, which ONNX Runtime has on a GPU too, where it has no bitwise operators."""

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder
        byte = np.arange(256, dtype=np.uint32)
        self._table = builder.constant((byte[:, None] ^ byte).reshape(-1), "uint32")

    def xor(self, first: str, second: str) -> str:
        """Byte by byte: the entry (a, b) of the table is a xor b."""
        builder, total = self._builder, ""
        for place in range(4):
            high, low = (self._byte(word, place) for word in (first, second))
            index = builder.op("Add", builder.op("Mul", high, self._word(256)), low)
            byte = builder.op("Gather", self._table, builder.cast(index, "int64"), axis=0)
            if place:
                byte = builder.op("Mul", byte, self._word(256**place))
            total = builder.op("Add", total, byte) if total else byte
        return total

    def rotate(self, word: str, count: int) -> str:
        """The product wraps around, and leaves its lowest bits 0."""
        builder = self._builder
        left = builder.op("Mul", word, self._word(2**count))
        return builder.op("Add", left, builder.op("Div", word, self._word(2 ** (32 - count))))

    def _byte(self, word: str, place: int) -> str:
        builder = self._builder
        shifted = builder.op("Div", word, self._word(256**place)) if place else word
        if place == 3:
            return shifted
        higher = builder.op("Div", word, self._word(256 ** (place + 1)))
        return builder.op("Sub", shifted, builder.op("Mul", higher, self._word(256)))

    def _word(self, value: int) -> str:
        return self._builder.constant(value, "uint32")


def threefry(
    builder: GraphBuilder, words: Words, key: tuple[str, str], counter: tuple[str, str]
) -> tuple[str, str]:
    """`export.noise.threefry` on uint32 values that broadcast against each other."""
    key0, key1 = key
    parity = builder.constant(PARITY, "uint32")
    schedule = (key0, key1, words.xor(words.xor(key0, key1), parity))
    x0, x1 = builder.op("Add", counter[0], key0), builder.op("Add", counter[1], key1)
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = builder.op("Add", x0, x1)
            x1 = words.xor(words.rotate(x1, rotation), x0)
        injection = builder.constant(group + 1, "uint32")
        x0 = builder.op("Add", x0, schedule[(group + 1) % 3])
        x1 = builder.op("Add", builder.op("Add", x1, schedule[(group + 2) % 3]), injection)
    return x0, x1


def normal_pairs(builder: GraphBuilder, words: Words, seeds: str, indices: str, k: str, pairs: str) -> str:
    """`export.noise.normal_noise` before pairs are put in a row: float64 [batch, pairs, 2].

    Args:
        builder: the graph.
        words: how it computes with words.
        seeds: uint32 [1] or [batch].
        indices: uint32 [batch].
        k: uint32, one number.
        pairs: uint32 [pairs], their numbers.
    """

    def number(value: float) -> str:
        return builder.constant(value, "float64")

    axis, last = builder.constant([1], "int64"), builder.constant([-1], "int64")
    key = (builder.op("Unsqueeze", seeds, axis), builder.op("Unsqueeze", indices, axis))
    w0, w1 = threefry(builder, words, key, (k, pairs))
    uniform, turn = (
        builder.op("Div", builder.op("Add", builder.cast(word, "float64"), number(0.5)), number(2.0**32))
        for word in (w0, w1)
    )
    radius = builder.op("Sqrt", builder.op("Mul", builder.op("Log", uniform), number(-2.0)))
    angle = builder.op("Mul", turn, number(2.0 * math.pi))
    halves = [
        builder.op("Unsqueeze", builder.op("Mul", radius, builder.op(function, angle)), last)
        for function in ("Cos", "Sin")
    ]
    return builder.op("Concat", *halves, axis=-1)


def normal_noise(
    builder: GraphBuilder, words: Words, seeds: str, indices: str, k: str, shape: tuple[int, ...]
) -> str:
    """`export.noise.normal_noise`: float64 [batch, *shape]; arguments as for `normal_pairs`."""
    size = math.prod(shape)
    num_pairs = (size + 1) // 2
    bounds = (builder.constant(each, "int64") for each in (0, num_pairs, 1))
    pairs = builder.cast(builder.op("Range", *bounds), "uint32")
    noise = normal_pairs(builder, words, seeds, indices, k, pairs)
    if size % 2:
        flat = builder.op("Reshape", noise, builder.constant([0, 2 * num_pairs], "int64"))
        first, end, axis = (builder.constant([each], "int64") for each in (0, size, 1))
        noise = builder.op("Slice", flat, first, end, axis)
    return builder.op("Reshape", noise, builder.constant([0, *shape], "int64"))
