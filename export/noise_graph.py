"""The noise of `export.noise` as operators of an ONNX graph: the same words, and the same numbers."""

from typing import Protocol

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


def normal_noise(
    builder: GraphBuilder, words: Words, seeds: str, indices: str, k: str, shape: tuple[int, ...]
) -> str:
    """`export.noise.normal_noise`: float64 [batch, *shape].

    Args:
        builder: the graph.
        words: how it computes with words.
        seeds: uint32 [1] or [batch].
        indices: uint32 [batch].
        k: uint32 scalar.
        shape: shape of one sample.
    """
    size = 1
    for length in shape:
        size *= length
    num_pairs = (size + 1) // 2

    def number(value: float) -> str:
        return builder.constant(value, "float64")

    axis = builder.constant([1], "int64")
    pairs = builder.cast(
        builder.op("Range", *(builder.constant(each, "int64") for each in (0, num_pairs, 1))), "uint32"
    )
    key = (builder.op("Unsqueeze", seeds, axis), builder.op("Unsqueeze", indices, axis))
    w0, w1 = threefry(builder, words, key, (k, pairs))
    uniform, turn = (
        builder.op("Div", builder.op("Add", builder.cast(word, "float64"), number(0.5)), number(2.0**32))
        for word in (w0, w1)
    )
    radius = builder.op("Sqrt", builder.op("Mul", builder.op("Log", uniform), number(-2.0)))
    angle = builder.op("Mul", turn, number(6.283185307179586))
    last = builder.constant([-1], "int64")
    halves = [
        builder.op("Unsqueeze", builder.op("Mul", radius, builder.op(function, angle)), last)
        for function in ("Cos", "Sin")
    ]
    flat = builder.op(
        "Reshape", builder.op("Concat", *halves, axis=-1), builder.constant([0, 2 * num_pairs], "int64")
    )
    if size % 2:
        first, end = builder.constant([0], "int64"), builder.constant([size], "int64")
        flat = builder.op("Slice", flat, first, end, axis)
    return builder.op("Reshape", flat, builder.constant([0, *shape], "int64"))
