"""Reading an image of any format as a square with 8 bits per channel."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion.data.image_reading import channels_of, read_square, to_array
from diffusion.errors import InputError


def random_image(mode: str, size=(20, 16), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def read(path, size=8):
    square = read_square(path, size)
    return to_array(square, channels_of(square))


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("1", ".png", 1),
        ("1", ".pbm", 1),
        ("L", ".bmp", 1),
        ("L", ".tiff", 1),
        ("L", ".jpg", 1),
        ("L", ".jp2", 1),
        ("LA", ".png", 1),
        ("I;16", ".png", 1),
        ("I;16", ".tiff", 1),
        ("I", ".tiff", 1),
        ("F", ".tiff", 1),
        ("P", ".gif", 3),
        ("P", ".png", 3),
        ("RGB", ".jpg", 3),
        ("RGB", ".ppm", 3),
        ("RGB", ".tga", 3),
        ("RGB", ".pcx", 3),
        ("RGBA", ".png", 3),
        ("RGBA", ".webp", 3),
        ("RGBA", ".ico", 3),
        ("RGBA", ".dds", 3),
        ("CMYK", ".tiff", 3),
        ("CMYK", ".jpg", 3),
        ("YCbCr", ".jpg", 3),
    ],
)
def test_every_mode_of_pillow_is_read(tmp_path, mode, suffix, channels):
    path = tmp_path / f"image{suffix}"
    if mode == "I;16":
        image = Image.fromarray(np.asarray(random_image("L")).astype(np.uint16) * 257)
    else:
        image = random_image(mode)
    assert image.mode == mode
    image.save(path)
    pixels = read(path)
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == np.uint8
    assert pixels.std() > 1.0, "the picture is not blank"


def test_pixels_of_the_right_size_are_kept_as_they_are(tmp_path):
    image = random_image("RGB", (16, 16))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png", 16), np.asarray(image).transpose(2, 0, 1))


def test_grey_as_colour_has_three_equal_channels(tmp_path):
    random_image("L", (16, 16)).save(tmp_path / "a.png")
    square = read_square(tmp_path / "a.png", 16)
    colour = to_array(square, 3)
    assert channels_of(square) == 1 and colour.shape == (3, 16, 16)
    for channel in colour:
        np.testing.assert_array_equal(channel, to_array(square, 1)[0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white(tmp_path, mode):
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
    clear.convert(mode).save(tmp_path / ("clear.tiff" if mode == "PA" else "clear.png"))
    pixels = read(tmp_path / ("clear.tiff" if mode == "PA" else "clear.png"))
    assert (pixels[:, :, 4:] == 255).all() and (pixels[:, :, :4] == 0).all()


def test_half_transparent_is_half_white(tmp_path):
    Image.new("LA", (8, 8), (0, 128)).save(tmp_path / "half.png")
    assert np.abs(read(tmp_path / "half.png").astype(int) - 127).max() <= 1


def test_a_palette_entry_that_is_transparent_becomes_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 8, 4))
    image.save(tmp_path / "sprite.gif", transparency=1)
    pixels = read(tmp_path / "sprite.gif")
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] == np.array([255, 0, 0])[:, None, None]).all()


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bit_grey_keeps_its_shades(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"deep{suffix}")
    np.testing.assert_allclose(read(tmp_path / f"deep{suffix}")[0], ramp / 257.0, atol=0.51)


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path):
    Image.fromarray(np.full((8, 8), 200, dtype=np.uint16)).save(tmp_path / "night.png")
    assert (read(tmp_path / "night.png") == 1).all(), "200 of 65535, not of 255"


@pytest.mark.parametrize("largest", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_the_range_of_their_values(tmp_path, largest):
    ramp = np.linspace(0.0, largest, 64).reshape(8, 8).astype(np.float32)
    Image.fromarray(ramp).save(tmp_path / "float.tiff")
    expected = np.linspace(0.0, 255.0, 64).reshape(8, 8)
    np.testing.assert_allclose(read(tmp_path / "float.tiff")[0], expected, atol=0.51)


def test_pixels_that_are_not_numbers_are_refused(tmp_path):
    pixels = np.full((8, 8), 0.5, dtype=np.float32)
    pixels[3, 3] = np.nan
    Image.fromarray(pixels).save(tmp_path / "hole.tiff")
    with pytest.raises(InputError, match="hole.tiff .*not finite numbers"):
        read_square(tmp_path / "hole.tiff", 8)


@pytest.mark.parametrize(("orientation", "bright"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_photographs_are_turned_upright(tmp_path, orientation, bright):
    image = Image.new("L", (16, 16))
    image.paste(255, (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    square = read(tmp_path / "turned.png")[0].astype(float)
    halves = {
        "left": square[:, :4],
        "right": square[:, 4:],
        "top": square[:4],
        "bottom": square[4:],
    }
    assert max(halves, key=lambda name: halves[name].mean()) == bright


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("L", (8, 8), shade) for shade in (40, 90, 200)]
    for suffix in (".gif", ".webp", ".png", ".tiff"):
        path = tmp_path / f"moving{suffix}"
        options = {"lossless": True} if suffix == ".webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert (read(path) == 40).all()


def test_images_that_are_not_square_are_centre_cropped(tmp_path):
    image = Image.new("L", (48, 16))
    image.paste(255, (16, 0, 32, 16))
    image.save(tmp_path / "wide.png")
    assert (read(tmp_path / "wide.png", 16) == 255).all()


def test_a_large_jpeg_decoded_at_reduced_size_looks_the_same(tmp_path):
    smooth = np.add.outer(np.linspace(0, 120, 900), np.linspace(0, 120, 900)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(smooth).save(tmp_path / "large.png")
    reduced, full = (read(tmp_path / f"large.{suffix}", 32).astype(int) for suffix in ("jpg", "png"))
    assert np.abs(reduced - full).max() <= 3


def test_an_image_that_would_exhaust_memory_is_refused(tmp_path):
    """The first is below the limit at which Pillow raises an error itself, the second above it."""
    for side in (12_500, 20_000):
        path = tmp_path / f"bomb{side}.png"
        Image.new("1", (side, side)).save(path)
        with pytest.raises(InputError, match=f"bomb{side}.png") as caught:
            read_square(path, 8)
        assert "\n" not in str(caught.value)


def test_a_large_valid_image_is_read_without_a_warning(tmp_path):
    """Above 89 million pixels Pillow warns of a decompression bomb, and warnings are errors in tests."""
    Image.new("1", (9500, 9500), 1).save(tmp_path / "scan.png")
    assert (read(tmp_path / "scan.png") == 255).all()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("P", "GIF"),
        ("RGB", "JPEG"),
        ("RGB", "TIFF"),
        ("RGBA", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "PPM"),
        ("RGB", "PCX"),
        ("RGBA", "ICO"),
        ("RGBA", "DDS"),
        ("RGB", "JPEG2000"),
        ("RGB", "SGI"),
        ("RGB", "TGA"),
        ("RGBA", "ICNS"),
    ],
)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, mode, kind):
    buffer = io.BytesIO()
    random_image(mode, (32, 32)).save(buffer, format=kind)
    good = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    path = tmp_path / "broken.img"
    generator = np.random.default_rng(0)
    refused = 0
    for attempt in range(60):
        content = good.copy()
        if attempt % 2:
            content = content[: generator.integers(0, len(good))]
        else:
            positions = generator.integers(0, min(len(good), 200), size=4)
            content[positions] = generator.integers(0, 256, size=4)
        path.write_bytes(content.tobytes())
        try:
            assert read_square(path, 8).size == (8, 8)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="gone.png cannot be read"):
        read_square(tmp_path / "gone.png", 8)
