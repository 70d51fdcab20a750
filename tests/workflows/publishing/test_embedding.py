"""Pictures inside pages."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from diffusion.plots import save_animation
from workflows.publishing import embedding
from workflows.publishing.embedding import embedded_animation, embedded_picture, thumbnail


def decoded(uri):
    head, content = uri.split(",")
    assert head.startswith("data:image/") and head.endswith(";base64")
    return Image.open(io.BytesIO(base64.b64decode(content)))


def noise(side, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_small_picture_is_embedded_as_it_is(tmp_path):
    noise(32).save(tmp_path / "a.png")
    with decoded(embedded_picture(tmp_path / "a.png")) as picture:
        assert picture.format == "PNG" and picture.tobytes() == noise(32).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_large_picture_is_reduced_and_compressed(tmp_path, mode):
    noise(1500, mode).save(tmp_path / "a.png")
    with decoded(embedded_picture(tmp_path / "a.png")) as picture:
        assert picture.format == "WEBP" and max(picture.size) == 960


def test_a_thumbnail_keeps_the_shape(tmp_path):
    Image.new("L", (300, 100)).save(tmp_path / "a.png")
    with decoded(thumbnail(tmp_path / "a.png", 60)) as picture:
        assert picture.size == (60, 20)


def test_a_thumbnail_can_show_the_upper_left_part(tmp_path):
    picture = Image.new("L", (80, 80))
    picture.paste(200, (0, 0, 30, 30))
    picture.save(tmp_path / "a.png")
    with decoded(thumbnail(tmp_path / "a.png", 60, 3 / 8)) as part:
        assert part.size == (30, 30) and np.asarray(part.convert("L")).min() > 180


def test_an_animation_is_reduced_until_it_is_small_and_ends_with_its_last_frame(tmp_path, monkeypatch):
    sizes = (100, 20, 60), (60, 10, 30), (1, 1, 1)
    monkeypatch.setattr(embedding, "_ANIMATION_SIZES", sizes)
    frames = [*(noise(120, seed=seed) for seed in range(20)), Image.new("RGB", (120, 120), (200, 30, 90))]
    save_animation(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        largest = len(embedding._animated_webp(animation, *sizes[0]))
    monkeypatch.setattr(embedding, "_MAX_ANIMATION_BYTES", largest - 1)
    uri = embedded_animation(tmp_path / "a.gif")
    assert len(uri) < 4 / 3 * largest
    with decoded(uri) as animation:
        assert animation.format == "WEBP" and animation.n_frames > 5 and animation.width == 60
        animation.seek(animation.n_frames - 1)
        animation.load()
        last = np.asarray(animation.convert("RGB"), dtype=float).mean(axis=(0, 1))
        assert np.abs(last - [200, 30, 90]).max() < 8
        assert animation.info["duration"] >= 1500


@pytest.mark.parametrize("embed", [embedded_picture, embedded_animation, lambda path: thumbnail(path, 60)])
def test_a_picture_that_is_missing_or_cut_short_is_none(tmp_path, embed):
    assert embed(tmp_path / "a.png") is None
    noise(64).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    assert embed(tmp_path / "a.png") is None
