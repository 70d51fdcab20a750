"""Image folders: which files are used, bad images, links and classes."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion.config import DataConfig
from diffusion.data.image_folder import ImageFolder, class_names, image_files
from diffusion.errors import InputError


def random_image(mode: str, size=(20, 16), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def opened(folder, size=None, skip_bad=False):
    return ImageFolder(DataConfig(name=str(folder), image_size=size, skip_bad_images=skip_bad))


def pixels_of(folder, size, skip_bad=False):
    return opened(folder, size, skip_bad).load().values


def classes_of(folder, skip_bad=False):
    """Class of each image."""
    raw = opened(folder, 8, skip_bad).load()
    return [raw.classes[label] for label in raw.labels]


@pytest.fixture
def folder(tmp_path):
    """Forty grey images in two class folders."""
    for number in range(40):
        class_folder = tmp_path / f"class{number % 2}"
        class_folder.mkdir(exist_ok=True)
        random_image("L", seed=number).save(class_folder / f"{number:02}.png")
    return tmp_path


def test_a_folder_becomes_one_array_of_squares(folder):
    images = pixels_of(folder, 12)
    assert images.shape == (40, 1, 12, 12) and images.dtype == np.uint8
    assert opened(folder).image_side == 16, "the shorter side"
    assert pixels_of(folder, None).shape == (40, 1, 16, 16)


def test_images_are_in_the_order_of_their_paths(tmp_path):
    """Files of a folder stay together, even if other names sort between its name and the separator."""
    for number, name in enumerate(("a/1.png", "a/b/1.png", "a b.png", "b.png", "a/2.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / name)
    files = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert files == ["a/1.png", "a/2.png", "a/b/1.png", "a b.png", "b.png"]
    assert pixels_of(tmp_path, 8)[:, 0, 0, 0].tolist() == [0, 4, 1, 2, 3]


def test_one_colour_image_gives_all_images_three_channels_and_keeps_the_grey_values(folder):
    before = pixels_of(folder, 8)
    random_image("RGB").save(folder / "class0" / "19b.png")  # in the middle of the grey ones
    images = pixels_of(folder, 8)
    assert images.shape == (41, 3, 8, 8)
    grey = np.delete(images, 10, axis=0)
    for channel in range(3):
        np.testing.assert_array_equal(grey[:, channel], before[:, 0])
    assert (images[10, 0] != images[10, 1]).any()


def test_the_estimated_size_is_that_of_the_loaded_images(folder):
    for size in (None, 8):
        assert opened(folder, size).estimated_bytes == pixels_of(folder, size).nbytes
    random_image("RGB").save(folder / "class0" / "!first.png")
    assert opened(folder, 8).estimated_bytes == 41 * 3 * 8 * 8


def test_the_first_folder_below_names_the_class(folder):
    deeper = folder / "class1" / "more"
    deeper.mkdir()
    random_image("L").save(deeper / "a.png")
    assert classes_of(folder) == ["class0"] * 20 + ["class1"] * 21


def test_an_image_outside_the_class_folders_means_no_classes(folder):
    random_image("L").save(folder / "stray.png")
    raw = opened(folder, 8).load()
    assert raw.classes is None and raw.labels is None
    assert class_names(folder, [folder / "class0" / "x.png"]) == ["class0"]


def test_a_skipped_bad_image_has_no_class_name(folder):
    (folder / "class0" / "00b.png").write_bytes(b"not an image")
    assert classes_of(folder, skip_bad=True) == ["class0"] * 20 + ["class1"] * 20
    assert len(pixels_of(folder, 8, skip_bad=True)) == 40


def test_a_corrupt_image_among_good_ones_is_named(folder):
    bad = folder / "class0" / "bad.png"
    bad.write_bytes((folder / "class0" / "00.png").read_bytes()[:60])
    with pytest.raises(InputError) as caught:
        pixels_of(folder, 8)
    assert str(bad) in str(caught.value) and "--skip-bad-images" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(pixels_of(folder, 8, skip_bad=True)) == 40


def test_a_corrupt_first_image_does_not_hide_the_size_of_the_others(folder):
    (folder / "class0" / "!first.png").write_bytes(b"not an image")
    assert opened(folder).image_side == 16
    assert pixels_of(folder, None, skip_bad=True).shape == (40, 1, 16, 16)
    with pytest.raises(InputError, match="!first.png"):
        pixels_of(folder, None)


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".thumbnail.png").write_bytes(b"hidden")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        pixels_of(tmp_path, 8)


def test_a_folder_with_only_bad_images_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    for size in (None, 8):
        with pytest.raises(InputError, match="none of its images can be read"):
            pixels_of(tmp_path, size, skip_bad=True)


def test_hidden_folders_and_files_of_other_kinds_are_ignored(folder):
    hidden = folder / ".cache"
    hidden.mkdir()
    random_image("L").save(hidden / "a.png")
    (folder / "class0" / "report.pdf").write_bytes(b"%PDF")  # Pillow can write it, not read it
    (folder / "class0" / "labels.csv").write_text("a,b")
    os.mkfifo(folder / "class0" / "pipe.png")  # opening it would block forever
    assert len(image_files(folder)) == 40


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(folder, tmp_path_factory):
    os.symlink(folder / "class0" / "00.png", folder / "again.png")
    assert len(pixels_of(folder, 8)) == 41
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    random_image("L").save(outside)
    os.symlink(outside, folder / "leak.png")
    with pytest.raises(InputError, match="leak.png is a link to a file outside"):
        pixels_of(folder, 8, skip_bad=True)


def test_a_link_to_a_folder_is_refused_wherever_it_leads(folder, tmp_path_factory):
    for target in (tmp_path_factory.mktemp("outside"), folder / "class0", folder):
        link = folder / "linked"
        link.symlink_to(target, target_is_directory=True)
        with pytest.raises(InputError, match="linked is a link to a folder"):
            image_files(folder)
        link.unlink()


def test_the_folder_itself_may_be_a_link(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("home") / "photos"
    link.symlink_to(folder, target_is_directory=True)
    classes = classes_of(link)
    assert len(classes) == 40 and set(classes) == {"class0", "class1"}


def test_a_broken_link_is_a_bad_image(folder):
    os.symlink(folder / "gone.png", folder / "class0" / "broken.png")
    with pytest.raises(InputError, match="broken.png cannot be read"):
        pixels_of(folder, 8)
    assert len(pixels_of(folder, 8, skip_bad=True)) == 40


def test_a_subfolder_that_may_not_be_read_is_named(folder, monkeypatch):
    """It is not skipped silently. The error is simulated, since root can read everything."""
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("class0"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="class0 cannot be read .Permission denied"):
        image_files(folder)


def test_an_image_size_too_small_for_any_network_is_refused(folder):
    for number in range(40):
        random_image("L", (4, 3)).save(folder / f"class{number % 2}" / f"{number:02}.png")
    with pytest.raises(InputError, match="--image-size 3: give 4 or more"):
        pixels_of(folder, None)
    with pytest.raises(InputError, match="--image-size 3: give a whole number from 4"):
        opened(folder, 3)
