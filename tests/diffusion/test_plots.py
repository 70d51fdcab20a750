import numpy as np
import pytest
from PIL import Image, ImageSequence

from diffusion.plots import draw_samples, image_grid, plane_limits, save_animation, scatter


def dark(picture):
    """Bool [height, width]: the pixels of dots, without background, frame and labels."""
    pixels = np.asarray(picture).astype(int)
    # Dots are blue: far darker in red than in blue.
    return (pixels[..., 2] - pixels[..., 0] > 40) & (pixels[..., 0] < 150)


def tiles(grid, height, width):
    """Shape (rows, columns) of a grid and its images in reading order; the gap is found by trial."""
    pixels = np.asarray(grid)
    gap = next(
        gap
        for gap in range(1, 20)
        if not (np.array(pixels.shape[:2]) - gap) % (height + gap, width + gap) @ [1, 1]
    )
    rows, columns = ((np.array(pixels.shape[:2]) - gap) // (height + gap, width + gap)).tolist()
    corners = [
        (gap + row * (height + gap), gap + col * (width + gap))
        for row in range(rows)
        for col in range(columns)
    ]
    return (rows, columns), [pixels[top : top + height, left : left + width] for top, left in corners]


def test_a_grid_contains_every_image_once_in_reading_order_enlarged_by_a_whole_number():
    levels = np.arange(1.0, 6.0)
    images = np.broadcast_to(levels[:, None, None, None], (5, 1, 30, 40))
    grid = image_grid(images, (0.0, 5.0), cell=90)  # enlarged twice: 60 x 80
    shape, images_drawn = tiles(grid, 60, 80)
    assert shape == (2, 3)
    for tile, level in zip(images_drawn, [*levels, 0.0], strict=True):
        np.testing.assert_array_equal(tile, round(level / 5.0 * 255))
    assert (np.asarray(grid) > 0).sum() == 5 * 60 * 80  # nothing else is drawn


def test_a_grid_shows_the_ends_of_the_range_as_black_and_white_and_clips_beyond():
    images = np.broadcast_to(np.array([-5.0, -1.0, 1.0, 7.0]).reshape(4, 1, 1, 1), (4, 1, 30, 30))
    _, images_drawn = tiles(image_grid(images, (-1.0, 1.0), cell=30), 30, 30)
    assert [set(tile.ravel().tolist()) for tile in images_drawn] == [{0}, {0}, {255}, {255}]


def test_a_grid_keeps_the_orientation_of_images():
    image = np.arange(1200.0).reshape(1, 1, 30, 40) / 5.0
    _, (tile,) = tiles(image_grid(image, (0.0, 255.0), cell=40), 30, 40)
    np.testing.assert_array_equal(tile, image[0, 0].round())


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_grid_has_the_mode_and_the_colours_of_its_channels(channels, mode):
    images = np.zeros((1, channels, 30, 30))
    images[:, 0] = 1.0
    grid = image_grid(images, (0.0, 1.0), cell=30)
    assert grid.mode == mode
    _, (tile,) = tiles(grid, 30, 30)
    assert np.unique(tile.reshape(-1, channels), axis=0).tolist() == [[255] + [0] * (channels - 1)]


def test_images_larger_than_a_cell_keep_their_size():
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 100, 80)).astype(float)
    _, (tile,) = tiles(image_grid(image, (0.0, 255.0), cell=64), 100, 80)
    np.testing.assert_array_equal(tile, image[0, 0])


def test_a_scatter_plot_is_a_square_picture_of_the_given_size():
    assert scatter(np.zeros((3, 2)), size=200).size == (200, 200)


def centre(point):
    """Centre (column, row) of the dot of a point, drawn with limits -2 to 2."""
    rows, columns = np.nonzero(dark(scatter(np.array([point], dtype=float), limits=(-2.0, 2.0, -2.0, 2.0))))
    return np.array([columns.mean(), rows.mean()])


def test_a_point_is_drawn_at_its_coordinates_with_y_upward():
    origin = centre((0, 0))
    np.testing.assert_allclose(origin, [240, 240], atol=2)
    unit = (centre((1, 0)) - origin)[0]
    assert 80 < unit < 120  # four units fill the picture except its margin
    for x, y in ((1, 1), (-1, 0), (0, 1.5), (-1.5, -0.5)):
        np.testing.assert_allclose(centre((x, y)) - origin, [unit * x, -unit * y], atol=2)


def test_both_axes_have_the_same_scale():
    points = np.array([[-3.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    rows, columns = np.nonzero(dark(scatter(points)))
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(3.0, rel=0.1)


def test_points_outside_the_limits_are_left_out():
    picture = scatter(np.array([[5.0, 0.0], [0.0, -7.0]]), limits=(-1.0, 1.0, -1.0, 1.0))
    assert not dark(picture).any()


@pytest.mark.parametrize("limits", [(-2.0, 2.0, -2.0, 2.0), None], ids=["given", "own"])
def test_points_that_are_not_finite_are_left_out_and_the_others_drawn(limits):
    finite = np.array([[1.0, 1.0], [-1.0, -1.0]])
    broken = np.array([[np.nan, 0.0], [np.inf, -np.inf]])
    with np.errstate(all="ignore"):
        picture = scatter(np.concatenate([finite, broken]), limits=limits)
    np.testing.assert_array_equal(dark(picture), dark(scatter(finite, limits=limits)))
    assert dark(picture).any()


def test_one_column_is_drawn_along_a_line_and_of_many_columns_the_first_two():
    rows, columns = np.nonzero(dark(scatter(np.linspace(-1.0, 1.0, 40)[:, None])))
    assert np.ptp(rows) < 10
    assert np.ptp(columns) > 200
    many = np.random.default_rng(0).standard_normal((50, 4))
    np.testing.assert_array_equal(np.asarray(scatter(many)), np.asarray(scatter(many[:, :2])))


def test_points_that_are_all_the_same_can_be_drawn():
    assert dark(scatter(np.ones((5, 2)))).any()


def test_a_title_is_written_above_the_frame():
    points = np.zeros((1, 2))
    difference = np.asarray(scatter(points, title="epoch")).astype(int) - np.asarray(scatter(points))
    rows = np.nonzero(difference.any(axis=(1, 2)))[0]
    assert 0 < rows.min()
    assert rows.max() < 34


def test_plane_limits_leave_a_margin_of_a_tenth_on_every_side():
    limits = plane_limits(np.array([[0.0, -1.0], [10.0, 4.0]]))
    assert limits == pytest.approx((-1.0, 11.0, -1.5, 4.5))


def test_samples_with_a_range_are_drawn_as_a_grid_and_others_as_points():
    images, points = np.random.default_rng(0).uniform(0.0, 16.0, (4, 1, 8, 8)), np.zeros((4, 2))
    np.testing.assert_array_equal(
        np.asarray(draw_samples(images, (0.0, 16.0))), np.asarray(image_grid(images, (0.0, 16.0)))
    )
    limits = (-1.0, 1.0, -1.0, 1.0)
    np.testing.assert_array_equal(
        np.asarray(draw_samples(points, None, limits, "title")),
        np.asarray(scatter(points, limits, title="title")),
    )


def test_an_animation_contains_every_frame_loops_forever_and_holds_the_last(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    save_animation(frames, tmp_path / "a.gif", duration_ms=70, hold_ms=900)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.info["loop"] == 0
        frames_read = [
            (frame.convert("RGB").getpixel((5, 5)), frame.info["duration"])
            for frame in ImageSequence.Iterator(animation)
        ]
    assert frames_read == [((255, 0, 0), 70), ((0, 255, 0), 70), ((0, 0, 255), 900)]


def test_an_animation_of_noise_that_becomes_digits_stays_below_a_megabyte(tmp_path):
    """64 images of 8x8 in 24 frames, as a sweep over digits draws them."""
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 2, (64, 1, 8, 8)) * 16.0
    noise = rng.normal(8.0, 8.0, clean.shape)
    frames = [image_grid(noise + (clean - noise) * part, (0.0, 16.0)) for part in np.linspace(0.0, 1.0, 24)]
    save_animation(frames, tmp_path / "a.gif")
    assert (tmp_path / "a.gif").stat().st_size <= 1_000_000
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 24 and file.width >= 0.5 * frames[0].width
        file.seek(23)
        last = np.asarray(file.convert("L").resize(frames[0].size), float)
    assert np.abs(last - np.asarray(frames[-1], float)).mean() < 16.0, "the last frame is clear"


def test_a_small_animation_keeps_its_size_and_a_large_one_is_written_all_the_same(tmp_path):
    frames = [Image.effect_noise((64, 64), sigma) for sigma in (90, 60, 30)]
    save_animation(frames, tmp_path / "a.gif")
    save_animation(frames, tmp_path / "b.gif", max_bytes=10)
    for name, side in (("a.gif", 64), ("b.gif", 16)):
        with Image.open(tmp_path / name) as file:
            assert file.size == (side, side) and file.n_frames == 3
