"""Known parts and starts from given samples in `export.Sampler`, which PyTorch draws from one seed too."""

import numpy as np
import pytest

from diffusion.errors import InputError
from diffusion.process.inpainting import Inpainting
from diffusion.registry import SAMPLERS
from export.contract import SamplerSpec
from export.sampler import Sampler
from export.torch_sampler import TorchSampler

COUNT = 5


@pytest.fixture(name="given")
def _given():
    """Values of digits in data units, one image a sample, of which the upper half is known."""
    images = np.random.default_rng(0).integers(0, 17, (COUNT, 1, 8, 8)).astype(float)
    mask = np.zeros((8, 8), dtype=bool)
    mask[4:] = True
    return images, mask


def torch_samples(reference, table, **options):
    """Samples of `TorchSampler` in data units."""
    *_, x = reference.states(COUNT, table, **options)
    return reference.spec.denormalise(x)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * expected.std())


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("numbers", [(1, 1), (3, 2)])
def test_inpainting_equals_that_of_pytorch(image_model, image_sampler, given, name, numbers):
    """For every sampler, with resampling and without."""
    images, mask = given
    reference = TorchSampler.of(image_model)
    table = image_sampler.table(sampler=name, num_steps=6)
    unknown = np.broadcast_to(mask, (COUNT, 1, 8, 8)).astype(float)
    inpainting = Inpainting(image_sampler.spec.units.normalise(images), unknown, *numbers)
    expected = torch_samples(reference, table, inpainting=inpainting)
    actual = image_sampler.sample(
        COUNT, sampler=name, num_steps=6, known=images, mask=mask, resampling=numbers[0],
        jump_length=numbers[1],
    )  # fmt: skip
    assert_close(actual, expected)
    np.testing.assert_array_equal(actual[:, :, :4], images[:, :, :4])
    assert np.abs(actual - images)[:, :, 4:].max() > 1.0
    without = image_sampler.sample(COUNT, sampler=name, num_steps=6)
    assert np.abs(actual - without)[:, :, 4:].max() > 0.1


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_start_equals_that_of_pytorch(image_model, image_sampler, given, name):
    images, _ = given
    reference = TorchSampler.of(image_model)
    table = image_sampler.table(sampler=name, num_steps=8)
    x_0 = image_sampler.spec.units.normalise(images)
    expected = torch_samples(reference, table, x_0=x_0, strength=0.5)
    options = {"sampler": name, "num_steps": 8, "start_from": images}
    assert_close(image_sampler.sample(COUNT, **options, strength=0.5), expected)
    assert (
        np.abs(image_sampler.sample(COUNT, **options) - expected).max() > 0.1
    )  # 0.6 runs 5 steps instead of 4


def test_every_model_of_version_2_can_inpaint_and_start(version_2):
    """Noise levels, conditions, labels with guidance, a learned variance and x0_previous_2."""
    network, spec, content = version_2
    sampler = Sampler(content, provider="cpu")
    reference = TorchSampler(network, spec)
    conditions = reference.conditions(COUNT)
    images = np.random.default_rng(0).uniform(0.0, 16.0, (COUNT, *spec.shape))
    mask = np.arange(4) % 2 == np.arange(4)[:, None] % 2
    inpainting = Inpainting(
        spec.units.normalise(images), np.broadcast_to(mask, images.shape).astype(float), 2
    )
    expected = torch_samples(
        reference, sampler.spec.table, inpainting=inpainting, x_0=spec.units.normalise(images), strength=0.75
    )
    actual = sampler.sample(
        COUNT, conditions=conditions, known=images, mask=mask, resampling=2, start_from=images, strength=0.75
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_the_batch_size_makes_no_difference(image_sampler, given, batch_size):
    images, mask = given
    options = {"known": images, "mask": mask, "resampling": 2, "start_from": images[::-1], "strength": 0.7}
    expected = image_sampler.sample(COUNT, **options, batch_size=COUNT)
    np.testing.assert_allclose(
        image_sampler.sample(COUNT, **options, batch_size=batch_size), expected, rtol=0, atol=1e-4
    )
    part = image_sampler.sample(2, first_index=3, known=images[3:], mask=mask, resampling=2,
                                start_from=images[1::-1], strength=0.7)  # fmt: skip
    np.testing.assert_allclose(part, expected[3:], rtol=0, atol=1e-4)


def test_one_image_is_known_for_all_samples(image_sampler, given):
    images, mask = given
    one = image_sampler.sample(COUNT, known=images[0], mask=mask)
    np.testing.assert_array_equal(one, image_sampler.sample(COUNT, known=[images[0]] * COUNT, mask=mask))
    assert np.abs(one[0] - one[1])[:, 4:].max() > 0.1
    each = np.broadcast_to(mask, (COUNT, 1, 8, 8))
    np.testing.assert_array_equal(one, image_sampler.sample(COUNT, known=images[0], mask=each))
    np.testing.assert_array_equal(one, image_sampler.sample(COUNT, known=images[0], mask=mask.astype(int)))


def test_nan_stands_for_what_is_drawn(point_sampler):
    """A row may lack everything, or nothing."""
    known = np.array([[1.5, np.nan], [np.nan, 3.3], [np.nan, np.nan], [0.1, 0.2]])
    samples = point_sampler.sample(4, known=known, num_steps=6)
    finite = np.isfinite(known)
    np.testing.assert_array_equal(samples[finite], known.astype(np.float32)[finite])
    assert np.isfinite(samples).all()
    masked = point_sampler.sample(4, known=np.nan_to_num(known), mask=~finite, num_steps=6)
    np.testing.assert_array_equal(samples, masked)
    np.testing.assert_allclose(samples[2], point_sampler.sample(4, num_steps=6)[2], rtol=0, atol=1e-5)


def test_progress_counts_all_network_calls_and_previews_show_the_known_part(image_sampler, given):
    images, mask = given
    progress, previews = [], []
    image_sampler.sample(
        COUNT, num_steps=5, known=images, mask=mask, resampling=3, batch_size=3,
        on_row=lambda *numbers: progress.append(numbers), on_preview=previews.append,
    )  # fmt: skip
    assert progress == [(call, 26) for call in range(1, 27)]  # 4 steps run 3 times, for each of 2 batches
    np.testing.assert_array_equal(previews[0][:, :, :4], images[:3, :, :4])
    *_, last = image_sampler.stream(COUNT, num_steps=5, start_from=images, strength=0.4)
    assert (last.rows_done, last.num_rows) == (2, 2)
    np.testing.assert_array_equal(
        last.samples, image_sampler.sample(COUNT, num_steps=5, start_from=images, strength=0.4)
    )


def test_the_smaller_the_strength_the_closer_to_the_image(image_sampler, given):
    images, _ = given
    distances = [
        np.abs(
            image_sampler.sample(COUNT, num_steps=20, start_from=images, strength=strength) - images
        ).mean()
        for strength in (0.05, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.5 * distances[-1]


def test_frames_lead_from_one_start_to_the_other(image_sampler, given):
    """They share their noise, so equal ends give equal frames, and the ends are samples of sample()."""
    images, _ = given
    first, last = images[:2]
    frames = image_sampler.interpolate(first, last, 6, seed=3, strength=0.5, num_steps=8)
    assert frames.shape == (6, 1, 8, 8)
    alone = [
        image_sampler.sample(1, seed=3, num_steps=8, start_from=end, strength=0.5)[0] for end in (first, last)
    ]
    np.testing.assert_allclose(frames[[0, -1]], alone, rtol=0, atol=1e-4)
    middle = image_sampler.sample(1, seed=3, num_steps=8, start_from=0.6 * first + 0.4 * last, strength=0.5)
    np.testing.assert_allclose(frames[2], middle[0], rtol=0, atol=1e-4)
    still = image_sampler.interpolate(first, first, 3, num_steps=8)
    np.testing.assert_allclose(still, still[[0, 0, 0]], rtol=0, atol=1e-4)
    other = image_sampler.interpolate(first, last, 6, seed=3, strength=0.5, num_steps=8, first_index=1)
    assert np.abs(other - frames).max() > 0.1


def test_ends_at_the_limits_of_the_range_can_be_blended(image_sampler):
    """Rounding would lead out of it: 0.9 * 16 + 0.1 * 16 may be above 16."""
    white = np.full((1, 8, 8), 16.0)
    assert np.isfinite(image_sampler.interpolate(white, white, 30, num_steps=2)).all()


def test_frames_of_a_conditional_model_need_a_class(version_2):
    _, spec, content = version_2
    sampler = Sampler(content, provider="cpu")
    ends = np.zeros(spec.shape), np.ones(spec.shape)
    conditions = {each.name: np.zeros(each.shape) for each in spec.conditions}
    if not spec.classes:
        assert sampler.interpolate(*ends, 3, conditions=conditions).shape == (3, *spec.shape)
        return
    with pytest.raises(InputError, match="needs the same class"):
        sampler.interpolate(*ends, 3, conditions=conditions)
    frames = sampler.interpolate(*ends, 3, conditions=conditions, labels="dog")
    assert np.abs(frames - sampler.interpolate(*ends, 3, conditions=conditions, labels="cat")).max() > 1e-3
    assert sampler.interpolate(*ends, 3, conditions=conditions, guidance_scale=0.0).shape == frames.shape


IMAGE = np.full((1, 8, 8), 3.0)
HALF = np.arange(8) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": HALF}, "mask: it needs known values"),
        ({"resampling": 2}, "resampling: it needs known values"),
        ({"known": IMAGE, "mask": np.ones((8, 8))}, "no value is known"),
        ({"known": IMAGE, "mask": np.zeros((8, 8))}, "every value is known"),
        ({"known": IMAGE}, "every value is known"),
        ({"known": np.full((1, 8, 8), np.nan)}, "no value is known"),
        ({"known": IMAGE, "mask": np.full((8, 8), 255)}, "True where a value is drawn"),
        ({"known": IMAGE, "mask": np.ones((9, 8))}, r"mask has shape \[9, 8\]: give \[1, 8, 8\]"),
        ({"known": np.ones((8, 8))}, r"known has shape \[8, 8\]: give \[1, 8, 8\]"),
        ({"known": np.ones((2, 1, 8, 8))}, r"known has shape \[2, 1, 8, 8\]"),
        ({"known": "a.png"}, "known: give an array of numbers"),
        ({"known": IMAGE + 1j}, "known holds complex numbers"),
        ({"known": np.ma.masked_greater(IMAGE, 0.0)}, "known: elements of it are masked"),
        ({"start_from": np.ma.masked_greater(IMAGE, 0.0)}, "start_from: elements of it are masked"),
        ({"conditions": 3}, "conditions of type int: give {NAME: ARRAY}"),
        ({"known": IMAGE * 85.0, "mask": np.eye(8)}, "from 255 to 255, but the model's images have 0 to 16"),
        ({"known": IMAGE * np.inf, "mask": np.eye(8)}, "known is not finite"),
        ({"known": IMAGE * np.nan, "mask": np.eye(8)}, "known is not finite"),
        ({"known": IMAGE, "mask": np.eye(8), "resampling": 0}, "resampling 0: give a whole number from 1 to"),
        ({"known": IMAGE, "mask": np.eye(8), "resampling": 2.5}, "resampling 2.5: give a whole number"),
        ({"known": IMAGE, "mask": np.eye(8), "jump_length": 3}, "give resampling too"),
        ({"strength": 0.5}, "strength 0.5: it needs samples to start from"),
        ({"start_from": IMAGE, "strength": 0.0}, "strength 0: give a number above 0, up to 1"),
        ({"start_from": IMAGE, "strength": 1.5}, "strength 1.5: give a number above 0, up to 1"),
        ({"start_from": IMAGE, "strength": "much"}, "strength 'much': give a number"),
        ({"start_from": IMAGE - 4.0}, "from -1 to -1, but the model's images have 0 to 16"),
        ({"start_from": np.full((1, 8, 8), np.nan)}, "start_from is not finite"),
        ({"start_from": np.ones((3, 1, 8, 8))}, r"start_from has shape \[3, 1, 8, 8\]"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_in_one_line(image_sampler, options, message):
    with pytest.raises(InputError, match=message) as error:
        image_sampler.sample(COUNT, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("a", "b", "frames", "message"),
    [
        (IMAGE, np.ones(8), 3, r"b has shape \[8\]"),
        (IMAGE * np.nan, IMAGE, 3, "a is not finite"),
        (IMAGE, IMAGE * 20, 3, "b has values from 60 to 60"),
        (IMAGE, IMAGE, 1, "num_frames 1: give 2 to"),
    ],
)
def test_bad_ends_are_refused_in_one_line(image_sampler, a, b, frames, message):
    with pytest.raises(InputError, match=message):
        image_sampler.interpolate(a, b, frames)


def test_a_file_with_impossible_levels_is_refused_where_they_matter(
    point_onnx, metadata_of, with_metadata, point_sampler
):
    metadata = metadata_of(point_onnx)
    spec = SamplerSpec.from_metadata(metadata)
    levels = spec.table.alphas_cumprod.copy()
    levels[2] = 1.5
    broken = SamplerSpec(
        **{**vars(spec), "table": type(spec.table)(**{**vars(spec.table), "alphas_cumprod": levels})}
    )
    sampler = Sampler(with_metadata(point_onnx, broken.to_metadata()), provider="cpu")
    np.testing.assert_array_equal(sampler.sample(2), point_sampler.sample(2))
    for options in ({"known": [1.0, np.nan]}, {"start_from": [1.0, 1.0]}):
        with pytest.raises(InputError, match="alphas_cumprod is not between 0 and 1"):
            sampler.sample(2, **options)
        with pytest.raises(InputError, match="alphas_cumprod is not between 0 and 1"):
            sampler.stream(2, **options)  # before anything is asked for
