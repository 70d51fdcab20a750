import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data.dataset import load_dataset
from diffusion.data.image_reading import reduced
from diffusion.data.low_resolution import LowResolution, noised_by_seed
from diffusion.errors import InputError


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("height", "width", "side"), [(28, 28, 7), (32, 32, 8), (30, 20, 7)])
def test_images_are_reduced_as_pillow_reduces_them(height, width, side):
    images = random_images(5, 3, height, width)
    actual = reduced(images, side, (0.0, 255.0))
    assert actual.dtype == np.uint8
    for image, result in zip(images.reshape(-1, height, width), actual.reshape(-1, side, side), strict=True):
        expected = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
        assert np.abs(result.astype(int) - expected).max() <= 1, "Pillow rounds twice"


def test_digits_stay_whole_numbers():
    values = load_dataset(DataConfig(name="digits", image_size=4)).raw(
        load_dataset(DataConfig(name="digits", image_size=4)).val[:]
    )
    assert values.shape[1:] == (1, 4, 4)
    np.testing.assert_allclose(values, values.round(), atol=1e-5)


def test_low_resolution_images_are_those_that_the_first_model_of_a_cascade_is_trained_on(tmp_path):
    for number, image in enumerate(random_images(60, 16, 16, 3)):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    full = load_dataset(DataConfig(name=str(tmp_path), super_resolution="4:16"))
    small = load_dataset(DataConfig(name=str(tmp_path), image_size=4))
    low_resolution = LowResolution(full.spec, 4)
    computed = low_resolution.denormalised(low_resolution.of(full.train[:]))
    assert np.abs(computed - small.raw(small.train[:])).max() <= 1.5, "rounding to 8 bits"
    again = low_resolution.normalised(computed)
    torch.testing.assert_close(again, low_resolution.of(full.train[:]), atol=1e-6, rtol=0)


def test_noise_has_the_asked_strength_and_does_not_depend_on_the_number_of_images():
    clean = torch.zeros(400, 1, 7, 7)
    images, levels = noised_by_seed(clean, 0.25, seed=3)
    assert torch.equal(levels, torch.full((400,), 0.25))
    assert abs(float(images.std()) / 0.25 - 1.0) < 0.02
    assert torch.equal(noised_by_seed(clean[:5], 0.25, seed=3)[0], images[:5])
    assert not torch.equal(noised_by_seed(clean[:5], 0.25, seed=4)[0], images[:5])


def test_data_of_another_size_are_refused(tmp_path):
    from diffusion.data.memory import dataset_from_memory

    config = DataConfig(super_resolution="7:28")
    with pytest.raises(InputError, match="7:28: .* has images of 16x16 pixels; give images of the second"):
        dataset_from_memory(random_images(50, 1, 16, 16), config)
