import inspect
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from diffusion.errors import InputError
from diffusion.process.generate import sample_states
from diffusion.process.samplers import sampler_table
from export.engine import Engine
from export.limits import WATCHER_THREAD, Cancelled
from export.noise import normal_noise
from export.output import save_samples
from export.request import StreamOptions
from export.sampler import Sampler


def run_normalised(sampler, table, num_samples, seed):
    """The sampling loop written out: x <- c x0 + d x + f out + s z."""
    indices, shape = np.arange(num_samples), sampler.spec.shape
    x = normal_noise(seed, indices, 0, shape)
    for index, (timestep, row) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
        a, b, c, d, e, f, s, lo, hi = row
        assert e == 0.0
        out = sampler.denoise(x, int(timestep))
        x0 = np.clip(a * x + b * out, lo, hi)
        x = c * x0 + d * x + f * out + s * normal_noise(seed, indices, index + 1, shape)
    return x


def run_by_hand(sampler, table, num_samples, seed):
    return sampler.spec.denormalise(run_normalised(sampler, table, num_samples, seed))


def assert_close(actual, expected, tolerance):
    """Compare with a tolerance relative to the standard deviation, which must not be tiny."""
    assert actual.shape == expected.shape
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * expected.std())


@pytest.fixture(name="sampler", params=["image", "points"])
def _sampler(request, image_sampler, point_sampler):
    return image_sampler if request.param == "image" else point_sampler


@pytest.fixture(name="model_and_sampler", params=["image", "points"])
def _model_and_sampler(request, image_model, image_sampler, point_model, point_sampler):
    return (image_model, image_sampler) if request.param == "image" else (point_model, point_sampler)


def test_samples_are_float32_with_the_shape_of_the_data(sampler):
    samples = sampler.sample(5)
    assert samples.shape == (5, *sampler.spec.shape)
    assert samples.dtype == np.float32
    assert np.isfinite(samples).all()


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_samples_do_not_depend_on_the_batch_size(sampler, batch_size):
    """Except for rounding, since matrix products of another size round differently."""
    expected = sampler.sample(10, seed=4, batch_size=10)
    assert_close(sampler.sample(10, seed=4, batch_size=batch_size), expected, 1e-5)


@pytest.mark.parametrize("num_samples", [1, 4, 9])
def test_fewer_samples_are_the_first_of_more(sampler, num_samples):
    expected = sampler.sample(10, seed=4)
    actual = sampler.sample(num_samples, seed=4)
    assert actual.shape == (num_samples, *sampler.spec.shape)
    np.testing.assert_allclose(actual, expected[:num_samples], rtol=0, atol=1e-5 * expected.std())


def test_a_seed_repeats_and_another_differs(sampler):
    """The default is seed 0, and only the seed modulo 2^32 is used."""
    zero = sampler.sample(4, seed=0)
    np.testing.assert_array_equal(sampler.sample(4), zero)
    np.testing.assert_array_equal(sampler.sample(4, seed=2**32), zero)
    for seed in (1, -1, 2**31):
        assert np.abs(sampler.sample(4, seed=seed) - zero).max() > 0.1 * zero.std()


def test_samples_of_a_seed_differ_from_each_other(sampler):
    samples = sampler.sample(20).reshape(20, -1)
    distances = np.abs(samples[:, None] - samples[None]).max(axis=-1)
    assert distances[~np.eye(20, dtype=bool)].min() > 0.0


def test_samples_equal_those_of_pytorch(model_and_sampler):
    """From the same noise, with x in float64 between the network's calls."""
    model, sampler = model_and_sampler
    indices, shape = np.arange(16), model.data.shape
    noise = [
        torch.from_numpy(normal_noise(3, indices, k, shape)) for k in range(1 + len(model.table.timesteps))
    ]
    *_, (x, _) = sample_states(model.network, model.table, noise[0], lambda row: noise[row + 1])
    assert x.dtype == torch.float64
    assert_close(sampler.sample(16, seed=3), model.data.denormalise(x.numpy()), 1e-4)


def test_the_files_table_is_the_default(model_and_sampler):
    model, sampler = model_and_sampler
    np.testing.assert_array_equal(sampler.table().timesteps, model.table.timesteps)
    np.testing.assert_array_equal(sampler.table().coefficients, model.table.coefficients)
    expected = run_by_hand(sampler, model.table, 6, seed=2)
    assert_close(sampler.sample(6, seed=2), expected, 1e-6)


def test_passing_the_files_own_settings_changes_nothing(sampler):
    own = {name: sampler.spec.sampler[name] for name in ("num_steps", "eta", "spacing")}
    table = sampler.table(sampler=sampler.spec.sampler["name"], **own)
    np.testing.assert_array_equal(table.timesteps, sampler.spec.table.timesteps)
    np.testing.assert_array_equal(table.coefficients, sampler.spec.table.coefficients)
    np.testing.assert_array_equal(table.alphas_cumprod, sampler.spec.table.alphas_cumprod)


# The settings that the fixtures' models are deployed with, under the names of sampler_table.
OWN_IMAGE = {
    "sampler": "ddpm",
    "num_inference_steps": 10,
    "eta": 0.0,
    "variance": "beta",
    "spacing": "logsnr",
}
OWN_POINTS = {
    "sampler": "ddim", "num_inference_steps": 8, "eta": 0.5, "variance": "beta_tilde", "spacing": "leading",
}  # fmt: skip


@pytest.mark.parametrize(
    "choices",
    [
        {"sampler": "ddpm"},
        {"sampler": "ddim"},
        {"num_steps": 1},
        {"num_steps": 5},
        {"num_steps": 20},
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "ddim", "eta": 0.0},
        {"spacing": "linspace"},
        {"spacing": "logsnr"},
        {"spacing": "trailing"},
        {"sampler": "ddim", "num_steps": 7, "eta": 0.25, "spacing": "leading"},
    ],
    ids=str,
)
def test_a_setting_replaces_the_files_and_keeps_the_others(model_and_sampler, choices):
    model, sampler = model_and_sampler
    own, clip = (OWN_IMAGE, model.data.clip) if model.data.kind == "image" else (OWN_POINTS, None)
    renamed = {"num_inference_steps" if name == "num_steps" else name: v for name, v in choices.items()}
    expected = sampler_table(model.schedule, clip=clip, **{**own, **renamed})
    actual = sampler.table(**choices)
    np.testing.assert_array_equal(actual.timesteps, expected.timesteps)
    np.testing.assert_array_equal(actual.coefficients, expected.coefficients)
    np.testing.assert_array_equal(actual.alphas_cumprod, expected.alphas_cumprod)
    np.testing.assert_allclose(
        sampler.sample(3, seed=1, **choices), run_by_hand(sampler, expected, 3, seed=1), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize(
    "choices", [{"sampler": "ddpm"}, {"num_steps": 3}, {"eta": 0.0}, {"spacing": "linspace"}]
)
def test_a_setting_changes_the_samples(point_sampler, choices):
    own = point_sampler.sample(8)
    assert np.abs(point_sampler.sample(8, **choices) - own).max() > 1e-3 * own.std()


def test_other_settings_do_not_persist(sampler):
    before = sampler.sample(3)
    sampler.sample(3, sampler="ddim", num_steps=2, eta=1.0, spacing="linspace")
    np.testing.assert_array_equal(sampler.sample(3), before)


def test_images_stay_within_their_range(image_sampler):
    """Clipping reaches both ends, but leaves many values between them."""
    samples = image_sampler.sample(64)
    assert samples.min() == 0.0
    assert samples.max() == 16.0
    assert ((samples > 0.0) & (samples < 16.0)).mean() > 0.2


def test_points_are_in_data_units(point_sampler):
    """Each column has its own mean and standard deviation, and nothing is clipped."""
    x = run_normalised(point_sampler, point_sampler.spec.table, 100, seed=0)
    expected = np.stack([0.5 * x[:, 0] + 1.0, 3.0 * x[:, 1] - 2.0], axis=1)
    assert_close(point_sampler.sample(100), expected, 1e-6)


def test_denoise_gives_the_networks_output(model_and_sampler):
    model, sampler = model_and_sampler
    x = np.random.default_rng(0).standard_normal((4, *model.data.shape))
    for timestep in (0, 7, 19):
        expected = model.network(torch.from_numpy(x).float(), torch.full((4,), timestep)).numpy()
        actual = sampler.denoise(x, timestep)
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "batches"), [(5, 1024, 1), (5, 5, 1), (5, 2, 3), (4, 2, 2), (3, 1, 3)]
)
def test_progress_counts_every_network_call(image_sampler, num_samples, batch_size, batches):
    seen = []
    image_sampler.sample(
        num_samples, num_steps=4, batch_size=batch_size, on_row=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 4 * batches) for done in range(1, 4 * batches + 1)]


def test_batch_size_limits_the_networks_batch(point_sampler):
    sizes = []
    point_sampler.sample(7, num_steps=1, batch_size=3, on_preview=lambda x0: sizes.append(len(x0)))
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ({"num_samples": 0}, "num_samples 0"),
        ({"num_samples": -3}, "num_samples -3"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"num_steps": 0}, "0"),
        ({"num_steps": -1}, "-1"),
        ({"num_steps": 21}, "21"),
        ({"eta": -0.5}, "-0.5"),
        ({"eta": 1.5}, "1.5"),
        ({"eta": float("nan")}, "nan"),
        ({"sampler": "euler"}, "'euler'"),
        ({"spacing": "even"}, "'even'"),
        ({"num_samples": None}, "num_samples"),
        ({"num_samples": 2.5}, "num_samples 2.5: give a whole number"),
        ({"num_samples": True}, "num_samples True"),
        ({"num_samples": "2"}, "num_samples '2'"),
        ({"seed": 1.5}, "seed 1.5: give a whole number"),
        ({"seed": np.float64(2.0)}, "seed 2.0: give a whole number"),
        ({"seed": False}, "seed False"),
        ({"seed": "1"}, "seed '1'"),
        ({"seed": None}, "seed None"),
        ({"batch_size": 2.5}, "batch_size 2.5"),
        ({"first_index": 0.5}, "first_index 0.5"),
        ({"num_steps": 2.5}, "num_steps 2.5: give a whole number"),
        ({"eta": "1"}, "eta '1': give a number"),
        ({"time_limit": "1"}, "time_limit '1': give a number"),
        ({"guidance_scale": "1"}, "guidance_scale '1': give a number"),
        ({"sampler": ["ddim"]}, "sampler ['ddim']"),
        ({"seeds": [1, 2.5]}, "seeds[1] 2.5: give a whole number"),
        ({"seeds": [1, True]}, "seeds[1] True"),
        ({"seeds": [1]}, "1 seeds for 2 samples"),
        ({"seeds": []}, "0 seeds for 2 samples"),
        ({"seeds": 3}, "seeds 3: give a list"),
        ({"seeds": {1, 2}}, "seeds of type set: give a list"),
        ({"seeds": [1, 2], "seed": 3}, "seed 3"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_before_any_work(image_sampler, numbers, named):
    calls = []
    with pytest.raises(InputError) as caught:
        image_sampler.sample(**{"num_samples": 2, **numbers}, on_row=lambda *_: calls.append(1))
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not calls


def test_a_model_is_given_as_path_string_or_bytes(image_file, image_onnx):
    samples = [
        Sampler(model, provider="cpu").sample(2) for model in (image_file, str(image_file), image_onnx)
    ]
    np.testing.assert_array_equal(samples[0], samples[2])
    np.testing.assert_array_equal(samples[1], samples[2])


def test_the_public_arguments_and_their_defaults():
    parameters = inspect.signature(Sampler.sample).parameters
    assert {name: parameters[name].default for name in ("seed", "sampler", "num_steps")} == {
        "seed": 0, "sampler": None, "num_steps": None,
    }  # fmt: skip
    streamed = set(inspect.signature(Sampler.stream).parameters) | set(StreamOptions.__annotations__)
    assert streamed - {"options", "every"} == set(parameters) - {"on_row", "on_preview"}
    assert list(inspect.signature(Sampler).parameters)[:3] == ["model", "provider", "threads"]
    assert inspect.signature(Sampler).parameters["provider"].default == "auto"


def test_points_without_column_names_get_default_ones(
    point_sampler, with_metadata, metadata_of, point_onnx, tmp_path
):
    metadata = metadata_of(point_onnx)
    metadata["ray_ddpm.spec"] = metadata["ray_ddpm.spec"].replace('["height", "weight"]', "null")
    sampler = Sampler(with_metadata(point_onnx, metadata), provider="cpu")
    assert sampler.spec.data["columns"] is None
    save_samples(sampler.sample(2), sampler.spec, tmp_path / "points.csv")
    assert (tmp_path / "points.csv").read_text().splitlines()[0] == "x0,x1"


def test_whole_numbers_may_be_numpys(image_sampler):
    expected = image_sampler.sample(2, seed=3, num_steps=4)
    actual = image_sampler.sample(np.int64(2), seed=np.uint8(3), num_steps=np.int32(4))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("first_index", [0, 5])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_seed_for_each_sample_draws_what_they_draw_one_by_one(sampler, batch_size, first_index):
    seeds = [7, -1, 7, 2**40 + 3, 0]
    actual = sampler.sample(seeds=seeds, batch_size=batch_size, first_index=first_index)
    expected = np.concatenate([sampler.sample(1, seed=seed, first_index=first_index) for seed in seeds])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())
    np.testing.assert_array_equal(sampler.sample(5, seeds=np.array(seeds), first_index=first_index)[2:4],
                                  sampler.sample(5, seeds=seeds, first_index=first_index)[2:4])  # fmt: skip
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * expected.std()


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_stream_shows_estimates_and_ends_with_the_samples(sampler, batch_size, every):
    estimates, expected = [], None
    expected = sampler.sample(3, seed=1, batch_size=batch_size, on_preview=estimates.append)
    previews = list(sampler.stream(3, seed=1, batch_size=batch_size, every=every))
    total = len(estimates)
    assert [each.rows_done for each in previews] == sorted({*range(every, total + 1, every), total})
    assert {each.num_rows for each in previews} == {total}
    for preview in previews:
        num_current = len(estimates[preview.rows_done - 1])
        np.testing.assert_array_equal(preview.samples[-num_current:], estimates[preview.rows_done - 1])
        finished = len(preview.samples) - num_current
        np.testing.assert_array_equal(preview.samples[:finished], expected[:finished])
    np.testing.assert_array_equal(previews[-1].samples, expected)
    returned = []

    def read():
        returned.append((yield from sampler.stream(3, seed=1, batch_size=batch_size)))

    list(read())
    np.testing.assert_array_equal(returned[0], expected)


def test_a_stream_works_only_while_it_is_read(image_sampler, monkeypatch):
    """A paused one leaves the sampler free, and a closed one is over, its watching thread too."""
    calls, real = [], Engine.outputs
    monkeypatch.setattr(Engine, "outputs", lambda *inputs: calls.append(1) or real(*inputs))
    stream = image_sampler.stream(2, seed=3, time_limit=60.0)
    assert not calls
    first, second = next(stream), next(stream)
    assert (first.rows_done, second.rows_done, len(calls)) == (1, 2, 2)
    inside = image_sampler.sample(2, seed=3)
    assert len(calls) == 12
    np.testing.assert_array_equal(list(stream)[-1].samples, inside)
    other = image_sampler.stream(2, stop=threading.Event())
    next(other)
    assert [each for each in threading.enumerate() if each.name == WATCHER_THREAD]
    other.close()
    assert not [each for each in threading.enumerate() if each.name == WATCHER_THREAD]
    assert list(other) == []


def test_a_stream_refuses_bad_arguments_at_once_and_obeys_its_limits(image_sampler):
    with pytest.raises(InputError, match="seed 1.5"):
        image_sampler.stream(2, seed=1.5)
    with pytest.raises(InputError, match="every 0"):
        image_sampler.stream(2, every=0)
    stop = threading.Event()
    stream = image_sampler.stream(2, stop=stop)
    next(stream)
    stop.set()
    with pytest.raises(Cancelled):
        next(stream)
    slow = image_sampler.stream(2, time_limit=0.2)
    next(slow)
    time.sleep(0.25)
    with pytest.raises(InputError, match="time_limit 0.2"):
        next(slow)


def test_numpys_settings_are_the_callers_while_a_stream_is_paused(image_sampler):
    with np.errstate(invalid="raise", over="raise"):
        stream = image_sampler.stream(1)
        next(stream)
        assert (np.geterr()["over"], np.geterr()["invalid"]) == ("raise", "raise")
        stream.close()


def test_a_sampler_can_be_pickled(sampler):
    copy = pickle.loads(pickle.dumps(sampler))
    assert repr(copy) == repr(sampler)
    np.testing.assert_array_equal(copy.sample(3, seed=1), sampler.sample(3, seed=1))


def test_its_text_says_what_it_draws(image_sampler, point_sampler):
    assert repr(image_sampler) == "<Sampler: image [1, 8, 8]; ddpm, 10 steps; runs on CPU>"
    assert repr(point_sampler) == "<Sampler: points [2]; ddim, 8 steps; runs on CPU>"


def test_requests_from_several_threads_do_not_disturb_each_other(image_sampler):
    expected = [image_sampler.sample(3, seed=seed, batch_size=2) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda seed: image_sampler.sample(3, seed=seed, batch_size=2), range(6)))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("first_index", [1, 7])
def test_first_index_continues_an_earlier_call(sampler, first_index):
    actual = sampler.sample(3, seed=4, first_index=first_index)
    expected = sampler.sample(first_index + 3, seed=4)[first_index:]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.std())


def test_an_index_beyond_the_seeds_last_is_refused(image_sampler):
    assert image_sampler.sample(2, first_index=2**32 - 2).shape == (2, 1, 8, 8)
    with pytest.raises(InputError, match="first_index"):
        image_sampler.sample(3, first_index=2**32 - 2)
    with pytest.raises(InputError, match="first_index -1"):
        image_sampler.sample(3, first_index=-1)


def test_previews_end_with_the_samples(sampler):
    """There is one after each network call, and the last row of every table returns x0 itself."""
    previews = []
    samples = sampler.sample(3, seed=1, on_preview=previews.append)
    assert len(previews) == len(sampler.table().timesteps)
    assert all(preview.shape == samples.shape for preview in previews)
    np.testing.assert_array_equal(previews[-1], samples)
    assert np.abs(previews[0] - samples).max() > 0.01 * samples.std()


def test_a_file_without_a_fast_sampler_says_so(sampler):
    with pytest.raises(
        InputError, match="sampler fast: no fast sampler was measured .* ddpm, ddim, dpmpp_2m"
    ):
        sampler.sample(2, sampler="fast")
