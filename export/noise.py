"""Counter-based noise, so that a seed gives the same samples at any batch size and in any language.

Threefry 2x32-20 (Salmon et al., SC 2011) with key = (seed mod 2^32, sample index) and
counter = (k, p): k = 0 is the initial noise, k = i + 1 the noise of the sampler table's row i, and
p is the index of a pair of neighbouring elements of the sample, in C order.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt32Array = NDArray[np.uint32]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
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
    words = (np.asarray(word, dtype=np.uint32) for word in (*key, *counter))
    key0, key1, x0, x1 = np.broadcast_arrays(*words)
    schedule = (key0, key1, key0 ^ key1 ^ PARITY)
    with np.errstate(over="ignore"):  # words wrap around
        x0, x1 = x0 + key0, x1 + key1
        for group in range(5):
            for rotation in ROTATIONS[group % 2]:
                x0 = x0 + x1
                x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
            x0 = x0 + schedule[(group + 1) % 3]
            x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
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
    seed: int | UInt32Array, sample_indices: ArrayLike, k: int, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Standard normal noise: the Box-Muller transform of Threefry's words.

    Two words w0, w1 give u = (w0 + 0.5) / 2^32 and theta = 2 pi (w1 + 0.5) / 2^32; elements 2p and
    2p + 1 of a sample are r cos theta and r sin theta with r = sqrt(-2 ln u).

    Args:
        seed: any integer, of which only seed mod 2^32 is used, or one of `seed_words` for each sample.
        sample_indices: indices of the samples within the seed, [batch].
        k: 0 for the initial noise, i + 1 for the noise of row i of the sampler's table.
        shape: shape of one sample.

    Returns:
        float64 [batch, *shape].
    """
    size = int(np.prod(shape))
    pairs = np.arange((size + 1) // 2, dtype=np.uint32)
    indices = np.asarray(sample_indices).astype(np.uint32)[:, None]
    words = seed if isinstance(seed, np.ndarray) else seed_words(seed)
    w0, w1 = threefry((words.reshape(-1, 1), indices), (np.uint32(k), pairs))
    radius = np.sqrt(-2.0 * np.log((w0 + 0.5) / 2.0**32))
    theta = 2.0 * np.pi * (w1 + 0.5) / 2.0**32
    values = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1).reshape(len(indices), -1)
    return values[:, :size].reshape(len(indices), *shape)
