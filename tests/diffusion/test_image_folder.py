"""Folders of odd images: which files count, what becomes of bad ones, classes."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import InputError
from diffusion.image_folder import (
    class_names,
    default_image_size,
    folder_bytes,
    image_files,
    load_image_folder,
)


def random_image(mode: str, size=(20, 16), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def pixels_of(folder, size, skip_bad=False):
    return load_image_folder(folder, size, skip_bad).pixels


@pytest.fixture
def folder(tmp_path):
    """Forty grey images in two class folders."""
    for number in range(40):
        place = tmp_path / f"class{number % 2}"
        place.mkdir(exist_ok=True)
        random_image("L", seed=number).save(place / f"{number:02}.png")
    return tmp_path


def test_a_folder_becomes_one_array_of_squares(folder):
    images = pixels_of(folder, 12)
    assert images.shape == (40, 1, 12, 12) and images.dtype == np.uint8
    assert default_image_size(folder) == 16, "the shorter side"
    assert pixels_of(folder, None).shape == (40, 1, 16, 16)


def test_images_stand_in_the_order_of_their_paths(tmp_path):
    """A folder's files together, whatever characters sort between its name and the separator."""
    for number, name in enumerate(("a/1.png", "a/b/1.png", "a b.png", "b.png", "a/2.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / name)
    files = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)]
    assert files == ["a/1.png", "a/2.png", "a/b/1.png", "a b.png", "b.png"]
    assert pixels_of(tmp_path, 8)[:, 0, 0, 0].tolist() == [0, 4, 1, 2, 3]


def test_one_coloured_image_makes_all_coloured_and_keeps_the_grey_ones(folder):
    before = pixels_of(folder, 8)
    random_image("RGB").save(folder / "class0" / "19b.png")  # in the middle of the grey ones
    images = pixels_of(folder, 8)
    assert images.shape == (41, 3, 8, 8)
    grey = np.delete(images, 10, axis=0)
    for channel in range(3):
        np.testing.assert_array_equal(grey[:, channel], before[:, 0])
    assert (images[10, 0] != images[10, 1]).any()


def test_what_the_images_will_take_is_known_before_they_are_loaded(folder):
    for size in (None, 8):
        assert folder_bytes(folder, size) == pixels_of(folder, size).nbytes
    random_image("RGB").save(folder / "class0" / "!first.png")
    assert folder_bytes(folder, 8) == 41 * 3 * 8 * 8


def test_the_first_folder_below_names_the_class(folder):
    deeper = folder / "class1" / "more"
    deeper.mkdir()
    random_image("L").save(deeper / "a.png")
    names = load_image_folder(folder, 8, skip_bad=False).class_names
    assert names == ["class0"] * 20 + ["class1"] * 21


def test_one_image_beside_the_folders_and_there_are_no_classes(folder):
    random_image("L").save(folder / "stray.png")
    assert load_image_folder(folder, 8, skip_bad=False).class_names is None
    assert class_names(folder, [folder / "class0" / "x.png"]) == ["class0"]


def test_a_bad_image_left_out_takes_its_class_along(folder):
    (folder / "class0" / "00b.png").write_bytes(b"not an image")
    found = load_image_folder(folder, 8, skip_bad=True)
    assert found.class_names == ["class0"] * 20 + ["class1"] * 20 and len(found.pixels) == 40


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
    assert default_image_size(folder) == 16
    assert pixels_of(folder, None, skip_bad=True).shape == (40, 1, 16, 16)
    with pytest.raises(InputError, match="!first.png"):
        pixels_of(folder, None)


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".thumbnail.png").write_bytes(b"hidden")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        pixels_of(tmp_path, 8)


def test_a_folder_of_nothing_but_bad_images_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    for size in (None, 8):
        with pytest.raises(InputError, match="not one of its images can be read"):
            pixels_of(tmp_path, size, skip_bad=True)


def test_hidden_folders_and_files_of_other_kinds_are_passed_over(folder):
    hidden = folder / ".cache"
    hidden.mkdir()
    random_image("L").save(hidden / "a.png")
    (folder / "class0" / "report.pdf").write_bytes(b"%PDF")  # Pillow can write it, not read it
    (folder / "class0" / "labels.csv").write_text("a,b")
    os.mkfifo(folder / "class0" / "pipe.png")  # opening it would wait for ever
    assert len(image_files(folder)) == 40


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(folder, tmp_path_factory):
    os.symlink(folder / "class0" / "00.png", folder / "again.png")
    assert len(pixels_of(folder, 8)) == 41
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    random_image("L").save(outside)
    os.symlink(outside, folder / "leak.png")
    with pytest.raises(InputError, match="leak.png is a link out of"):
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
    found = load_image_folder(link, 8, skip_bad=False)
    assert len(found.pixels) == 40 and set(found.class_names) == {"class0", "class1"}


def test_a_link_that_leads_nowhere_is_a_bad_image(folder):
    os.symlink(folder / "gone.png", folder / "class0" / "broken.png")
    with pytest.raises(InputError, match="broken.png cannot be read"):
        pixels_of(folder, 8)
    assert len(pixels_of(folder, 8, skip_bad=True)) == 40


def test_a_subfolder_that_may_not_be_read_is_named(folder, monkeypatch):
    """Not left out in silence; who runs as root may read everything, so the system is stood in for."""
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("class0"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="class0 cannot be read .Permission denied"):
        image_files(folder)


def test_an_image_size_too_small_for_any_network_is_refused(folder):
    with pytest.raises(InputError, match="--image-size 4: give 8 or more"):
        pixels_of(folder, 4)
