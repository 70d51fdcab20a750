import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from diffusion.networks.embeddings import sinusoidal_embedding

# The example in source document 004, digit by digit: d_model = 11, t = 0 to 9, two lines per t.
DOCUMENT_TABLE = """
0 1 0 1 0 1
    0 1 0 1 0
0.841470985 0.540302306 0.18628711 0.98249535 0.035104703 0.99938364
    0.006579285 0.999978356 0.001232846 0.99999924 0.000231013
0.909297427 -0.416146837 0.366052439 0.930594225 0.070166132 0.99753532
    0.013158285 0.999913426 0.002465691 0.99999696 0.000462026
0.141120008 -0.989992497 0.533002529 0.846113647 0.105141066 0.994457317
    0.019736715 0.999805212 0.003698532 0.99999316 0.000693039
-0.756802495 -0.653643621 0.681292572 0.732011223 0.13998639 0.990153428
    0.026314291 0.999653719 0.004931367 0.999987841 0.000924052
-0.958924275 0.283662185 0.80573104 0.592281598 0.17465915 0.984628956
    0.032890728 0.999458954 0.006164195 0.999981001 0.001155065
-0.279415498 0.960170287 0.901961427 0.431816609 0.209116605 0.977890713
    0.039465741 0.999220924 0.007397013 0.999972642 0.001386077
0.656986599 0.753902254 0.966614776 0.256234022 0.243316277 0.969947003
    0.046039046 0.998939641 0.00862982 0.999962762 0.00161709
0.989358247 -0.145500034 0.997427618 0.071680862 0.277216008 0.960807621
    0.052610358 0.998615116 0.009862614 0.999951363 0.001848103
0.412118485 -0.911130262 0.993321218 -0.115381796 0.310774009 0.950483832
    0.059179393 0.998247364 0.011095393 0.999938444 0.002079115
"""


def document_rows():
    numbers = DOCUMENT_TABLE.split()
    return [numbers[start : start + 11] for start in range(0, len(numbers), 11)]


def test_interleaved_layout_agrees_with_document_004_in_every_printed_digit():
    rows = document_rows()
    assert [len(row) for row in rows] == [11] * 10
    embedding = sinusoidal_embedding(torch.arange(10), 11, dtype=torch.float64)
    for row, values in zip(rows, embedding.tolist(), strict=True):
        for printed, value in zip(row, values, strict=True):
            last_digit = (
                Decimal(1).scaleb(Decimal(printed).as_tuple().exponent) if "." in printed else Decimal(1)
            )
            assert abs(Decimal(value) - Decimal(printed)) <= last_digit / 2 + Decimal("1e-15"), (
                printed,
                value,
            )


def test_interleaved_layout_agrees_with_the_worked_example_of_document_004():
    """PE(4, 5) = cos(4 / 10000^(4/11)), about 0.99015."""
    value = sinusoidal_embedding(torch.tensor([4]), 11, dtype=torch.float64)[0, 5].item()
    assert value == pytest.approx(math.cos(4 / 10000 ** (4 / 11)), abs=1e-14)
    assert round(value, 5) == 0.99015


@pytest.mark.parametrize("dim", [2, 3, 11, 64])
@pytest.mark.parametrize("max_period", [10000.0, 100.0])
def test_interleaved_layout_is_the_formula_element_by_element(dim, max_period):
    timesteps = [0.0, 1.0, 17.0, 999.0, -3.5]
    embedding = sinusoidal_embedding(
        torch.tensor(timesteps), dim, "interleaved", max_period, dtype=torch.float64
    )
    for t, row in zip(timesteps, embedding.tolist(), strict=True):
        for column, value in enumerate(row):
            angle = t / max_period ** (2 * (column // 2) / dim)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dim", [4, 7, 32, 65, 128])
def test_concatenated_layout_is_that_of_the_ddpm_code(dim):
    """diffusers computes in float32, so its angles, up to 999, have errors of about 1e-4."""
    timesteps = torch.tensor([0, 1, 2, 50, 999])
    oracle = get_timestep_embedding(
        timesteps, dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000
    )
    ours = sinusoidal_embedding(timesteps, dim, "concatenated")
    assert ours.shape == oracle.shape
    assert ours.dtype == torch.float32
    assert (ours - oracle).abs().max() < 2e-4
    assert (ours - oracle)[:3].abs().max() < 1e-6


@pytest.mark.parametrize("dim", [4, 7, 32])
def test_concatenated_frequencies_fall_from_1_to_exactly_1_over_max_period(dim):
    half = dim // 2
    embedding = sinusoidal_embedding(torch.tensor([0.5]), dim, "concatenated", 500.0, dtype=torch.float64)[0]
    assert embedding[0].item() == pytest.approx(math.sin(0.5), abs=1e-15)
    assert embedding[half - 1].item() == pytest.approx(math.sin(0.5 / 500.0), abs=1e-15)
    assert embedding[2 * half - 1].item() == pytest.approx(math.cos(0.5 / 500.0), abs=1e-15)
    if dim % 2:
        assert embedding[-1].item() == 0.0


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_numbers_of_any_shape_are_embedded_independently_in_a_new_last_dimension(layout):
    numbers = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embedding = sinusoidal_embedding(numbers, 6, layout, dtype=torch.float64)
    assert embedding.shape == (3, 2, 4, 6)
    torch.testing.assert_close(
        embedding[1, 0, 2], sinusoidal_embedding(numbers[1, 0, 2], 6, layout, dtype=torch.float64)
    )


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_float32_results_are_rounded_float64_results_even_for_large_timesteps(layout):
    timesteps = torch.tensor([99_999, 1_000_000])
    exact = sinusoidal_embedding(timesteps, 16, layout, dtype=torch.float64)
    np.testing.assert_array_equal(sinusoidal_embedding(timesteps, 16, layout), exact.float())


@pytest.mark.parametrize("dim", [1, 0, -4])
def test_a_dim_that_is_too_small_is_rejected_with_its_value(dim):
    with pytest.raises(ValueError, match=rf"dim {dim}\b"):
        sinusoidal_embedding(torch.arange(3), dim)


def test_an_unknown_layout_is_rejected_with_its_name():
    with pytest.raises(ValueError, match="'alternating'"):
        sinusoidal_embedding(torch.arange(3), 4, "alternating")
