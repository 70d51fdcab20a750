"""Counter-based noise, so that a seed gives the same samples at any batch size and in any language.

Threefry 2x32-20 (Salmon et al., SC 2011) with key = (seed mod 2^32, sample index) and
counter = (k, p): k = 0 is the initial noise, k = i + 1 the noise of the sampler table's row i, and
p is the index of a pair of neighbouring elements of the sample, in C order.
"""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt32Array = NDArray[np.uint32]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PAIRS_PER_BLOCK = 2**14  # whose words stay in a core's cache
_BLOCKS_FOR_THREADS = 8  # from which on starting threads pays
PARITY = np.uint32(0x1BD11BDA)
_BETWEEN_MODELS = np.uint32(0xFFFFFFFF)  # k of what belongs to no row of a table


def threefry(
    key: tuple[ArrayLike, ArrayLike], counter: tuple[ArrayLike, ArrayLike]
) -> tuple[UInt32Array, UInt32Array]:
    """Threefry 2x32 with 20 rounds.

    Args:
        key: two uint32 words of any shape; all four words broadcast against each other.
        counter: two uint32 words of any shape.

    Returns:
        Two uint32 arrays of the common shape.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, Section 3.3.
    """
    key0, key1, counter0, counter1 = (np.asarray(word, dtype=np.uint32) for word in (*key, *counter))
    schedule = (key0, key1, key0 ^ key1 ^ PARITY)
    shape = np.broadcast_shapes(key0.shape, key1.shape, counter0.shape, counter1.shape)
    x0, x1, shifted = (np.empty(shape, dtype=np.uint32) for _ in range(3))
    with np.errstate(over="ignore"):  # words wrap around
        np.add(counter0, key0, out=x0)
        np.add(counter1, key1, out=x1)
        for group in range(5):
            for rotation in ROTATIONS[group % 2]:
                x0 += x1
                np.left_shift(x1, np.uint32(rotation), out=shifted)
                x1 >>= np.uint32(32 - rotation)
                x1 |= shifted
                x1 ^= x0
            x0 += schedule[(group + 1) % 3]
            x1 += schedule[(group + 2) % 3]
            x1 += np.uint32(group + 1)
    return x0, x1


def stage_seed(seed: int, stage: int) -> int:
    """Seed of the noise of a model in a cascade, so that each has its own: the seed itself for the first.

    For another one it is the first of Threefry's words for key = (seed mod 2^32, stage) and
    counter = (2^32 - 1, 0), which no sample's noise has.

    Args:
        seed: seed of the cascade.
        stage: number of the model, from 0.
    """
    if stage == 0:
        return seed
    word, _ = threefry((seed_words(seed), np.uint32(stage)), (_BETWEEN_MODELS, np.uint32(0)))
    return int(word)


def condition_noise(seed: int, sample_indices: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Noise of the images that a model in a cascade receives: `normal_noise` with k = 2^32 - 1.

    Args:
        seed: `stage_seed` of the model.
        sample_indices: indices of the samples, [batch].
        shape: shape of one image.
    """
    return normal_noise(seed, sample_indices, int(_BETWEEN_MODELS), shape)


def seed_words(seeds: int | Sequence[int]) -> UInt32Array:
    """The first word of the key for one seed, [], or several, [batch]: the seed modulo 2^32."""
    if isinstance(seeds, Sequence):
        return np.array([int(seed) % 2**32 for seed in seeds], dtype=np.uint32)
    return np.array(int(seeds) % 2**32, dtype=np.uint32)


def normal_noise(
    seed: int | UInt32Array, sample_indices: ArrayLike, k: int, shape: tuple[int, ...], threads: int = 1
) -> NDArray[np.float64]:
    """Standard normal noise: the Box-Muller transform of Threefry's words.

    Two words w0, w1 give u = (w0 + 0.5) / 2^32 and theta = 2 pi (w1 + 0.5) / 2^32; elements 2p and
    2p + 1 of a sample are r cos theta and r sin theta with r = sqrt(-2 ln u).

    Args:
        seed: any integer, of which only seed mod 2^32 is used, or one of `seed_words` for each sample.
        sample_indices: indices of the samples within the seed, [batch].
        k: 0 for the initial noise, i + 1 for the noise of row i of the sampler's table.
        shape: shape of one sample.
        threads: number of threads to use if there is much to do; they do not change the numbers.

    Returns:
        float64 [batch, *shape].
    """
    size = math.prod(shape)
    num_pairs = (size + 1) // 2
    indices = np.asarray(sample_indices).astype(np.uint32)[:, None]
    words = seed if isinstance(seed, np.ndarray) else seed_words(seed)
    seeds = np.broadcast_to(words.reshape(-1, 1), indices.shape)
    values = np.empty((len(indices), 2 * num_pairs))
    samples = max(1, _PAIRS_PER_BLOCK // num_pairs)
    blocks = [
        (slice(first, first + samples), slice(pair, min(pair + _PAIRS_PER_BLOCK, num_pairs)))
        for first in range(0, len(indices), samples)
        for pair in range(0, num_pairs, _PAIRS_PER_BLOCK)
    ]

    def fill(block: tuple[slice, slice]) -> None:
        rows, pairs = block
        counter = np.arange(pairs.start, pairs.stop, dtype=np.uint32)
        w0, w1 = threefry((seeds[rows], indices[rows]), (np.uint32(k), counter))
        _box_muller(w0, w1, values[rows, 2 * pairs.start : 2 * pairs.stop])

    if threads == 1 or len(blocks) < _BLOCKS_FOR_THREADS:
        for block in blocks:
            fill(block)
    else:
        with ThreadPoolExecutor(threads) as pool:  # numpy lets other threads run while it computes
            deque(pool.map(fill, blocks), maxlen=0)
    return values[:, :size].reshape(len(indices), *shape)


def _box_muller(w0: UInt32Array, w1: UInt32Array, out: NDArray[np.float64]) -> None:
    """Write the noise of pairs of words, [..., pairs], to `out`, [..., 2 * pairs]."""
    radius = w0.astype(np.float64)
    radius += 0.5
    radius /= 2.0**32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    theta = w1.astype(np.float64)
    theta += 0.5
    theta *= 2.0 * np.pi
    theta /= 2.0**32
    np.multiply(radius, np.cos(theta), out=out[..., 0::2])
    np.multiply(radius, np.sin(theta), out=out[..., 1::2])
