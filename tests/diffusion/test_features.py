"""What images are compared by: the classifier and its cache, random networks, Inception's weights."""

import pickle
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion import feature_networks
from diffusion.config import DataConfig
from diffusion.data import Dataset, DataSpec, Examples, load_dataset
from diffusion.errors import InputError
from diffusion.feature_fitting import fit_features, with_features


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The digits' classifier, and the cache that it was put into."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.feature_fitting.CACHE", cache)
        return fit_features(digits, "auto"), cache


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, for classifiers that are trained for a moment only."""
    monkeypatch.setattr("diffusion.feature_fitting.CACHE", tmp_path / "cache")
    monkeypatch.setattr(feature_networks, "_STEPS", 5)
    return tmp_path / "cache"


def raw(dataset, split):
    return torch.from_numpy(dataset.raw(getattr(dataset, split)[:]))


def of_test(features, dataset):
    return features(raw(dataset, "test"))


def noise_images(shape=(1, 8, 8), labels=None, count=60):
    """Random bytes in three splits, all with the same labels."""
    generator = torch.Generator().manual_seed(0)
    labels = None if labels is None else torch.tensor(labels)
    mean, std = torch.tensor(127.5), torch.tensor(74.0)
    splits = [
        Examples(torch.randint(256, (count, *shape), generator=generator).byte(), mean, std, labels)
        for _ in range(3)
    ]
    spec = DataSpec(
        name="noise",
        kind="image",
        shape=shape,
        mean=mean.tolist(),
        std=std.tolist(),
        range=(0.0, 255.0),
        columns=None,
        clip=(-2.0, 2.0),
        log_snr_window=(-8.0, 5.0),
        fingerprint="1" * 64,
    )
    return Dataset(spec, *splits)


@pytest.mark.parametrize("wanted", ["auto", "classifier", "random", "inception"])
def test_points_have_no_features(gaussian_dataset, wanted):
    assert with_features(gaussian_dataset(), wanted).features is None


def test_digits_have_a_classifier_that_knows_them(digits, trained):
    features, _ = trained
    assert features.name == "classifier"
    with torch.no_grad():
        guesses = features.network((raw(digits, "val") / 8.0 - 1.0).float()).argmax(dim=1)
    right = (guesses == digits.val.labels).double().mean().item()
    assert features.accuracy == pytest.approx(right, abs=1e-12)
    assert right > 0.9


def test_a_classifier_is_read_from_the_cache_bit_for_bit(digits, trained, monkeypatch):
    features, cache = trained
    monkeypatch.setattr("diffusion.feature_fitting.CACHE", cache)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: pytest.fail("it was trained again"))
    for wanted in ("auto", "classifier"):
        again = fit_features(digits, wanted)
        assert torch.equal(of_test(again, digits), of_test(features, digits))
        assert torch.equal(again.mean, features.mean) and torch.equal(again.std, features.std)
        assert again.accuracy == features.accuracy


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_cached_file_that_is_not_whole_is_trained_anew(digits, cache, kept):
    features = fit_features(digits, "auto")
    (file,) = (cache / "features").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    again = fit_features(digits, "auto")
    assert torch.equal(of_test(again, digits), of_test(features, digits))
    assert [each.read_bytes() for each in (cache / "features").iterdir()] == [whole]


@pytest.mark.parametrize("foreign", ["no accuracy", "other shapes"])
def test_a_cached_file_of_another_kind_leaves_no_trace(digits, cache, foreign):
    features = fit_features(digits, "auto")
    (file,) = (cache / "features").iterdir()
    weights = load_file(file)
    if foreign == "no accuracy":
        save_file(weights, file)
    else:
        save_file({**weights, "head.bias": torch.zeros(3)}, file, {"accuracy": "0.5"})
    assert torch.equal(of_test(fit_features(digits, "auto"), digits), of_test(features, digits))


def test_each_data_set_has_its_own_file(digits, cache):
    other = load_dataset(DataConfig(name="digits", val_fraction=0.2))
    for dataset in (digits, other, digits):
        fit_features(dataset, "auto")
    names = {file.stem.split("-")[0] for file in (cache / "features").iterdir()}
    assert names == {digits.spec.fingerprint, other.spec.fingerprint}


def test_a_cache_that_cannot_be_written_does_no_harm(digits, cache):
    expected = of_test(fit_features(digits, "auto"), digits)
    (file,) = (cache / "features").iterdir()
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("in the way")
    assert torch.equal(of_test(fit_features(digits, "auto"), digits), expected)


def test_a_cache_whose_disk_is_full_does_no_harm(digits, cache, monkeypatch):
    """Like a folder that may not be written to: safetensors has an error of its own for both."""

    def no_room(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(feature_networks, "save_file", no_room)
    assert fit_features(digits, "auto").name == "classifier"


def test_images_without_classes_have_random_features():
    features = fit_features(noise_images(), "auto")
    assert features.name == "random" and features.accuracy is None


@pytest.mark.parametrize("wanted", ["auto", "random"])
def test_features_and_the_process_do_not_move_each_others_random_state(digits, cache, wanted):
    """auto trains a classifier each time."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(of_test(fit_features(digits, wanted), digits))
        assert torch.equal(torch.get_rng_state(), before)
        for file in (cache / "features").glob("*"):
            file.unlink()
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "labels",
    [None, [0] * 60, [0] * 41 + [1] * 19, [0] * 30 + [2] * 30],
    ids=["no labels", "one class", "one of 19", "one of none"],
)
def test_a_classifier_without_enough_of_each_class_is_one_line(labels):
    dataset = noise_images(labels=labels)
    with pytest.raises(InputError) as caught:
        fit_features(dataset, "classifier")
    message = str(caught.value)
    assert message.startswith("--metrics.features classifier: noise needs two classes")
    assert "give random" in message and "\n" not in message
    assert fit_features(dataset, "auto").name == "random"


def test_twenty_images_of_a_class_are_enough(cache):
    assert fit_features(noise_images(labels=[0] * 40 + [1] * 20), "auto").name == "classifier"


def test_a_validation_split_without_labels_has_no_classifier():
    dataset = noise_images(labels=[0, 1] * 30)
    assert fit_features(replace(dataset, val=Examples(dataset.val[:])), "auto").name == "random"


@pytest.mark.parametrize("wanted", ["auto", "random"])
def test_features_of_the_training_split_have_mean_0_and_deviation_1(digits, trained, wanted):
    features = trained[0] if wanted == "auto" else fit_features(digits, wanted)
    found = features(raw(digits, "train"))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.mean(dim=0), torch.zeros_like(features.mean), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(found.std(dim=0), torch.ones_like(features.mean), atol=1e-9, rtol=0.0)


def test_a_feature_that_never_varies_is_0(monkeypatch):
    class Brightness(nn.Module):
        def features(self, images):
            brightness = images.mean(dim=(1, 2, 3))
            return torch.stack([brightness, torch.full_like(brightness, 0.3)], dim=1)

    monkeypatch.setattr("diffusion.feature_fitting.random_network", lambda channels: Brightness())
    dataset = noise_images()
    found = of_test(fit_features(dataset, "random"), dataset)
    assert found[:, 0].std() > 0.5 and not found[:, 1].any()


def test_features_are_of_each_image_alone(digits, trained):
    """However many are asked about at once."""
    features, images = trained[0], raw(digits, "train")
    alone = torch.cat([features(part) for part in images[:30].split(1)])
    torch.testing.assert_close(alone, features(images)[:30], atol=1e-4, rtol=0.0)


def test_features_do_not_depend_on_the_unit_of_the_pixels(digits):
    scale = 255.0 / 16.0
    scaled = DataSpec.from_dict(
        {
            **digits.spec.to_dict(),
            "mean": (torch.tensor(digits.spec.mean) * scale).tolist(),
            "std": (torch.tensor(digits.spec.std) * scale).tolist(),
            "range": (0.0, 255.0),
        }
    )
    one, other = digits, replace(digits, spec=scaled)
    torch.testing.assert_close(
        *(of_test(fit_features(each, "random"), each) for each in (one, other)), atol=1e-3, rtol=0.0
    )


@pytest.mark.parametrize("wanted", ["classifier", "random"])
@pytest.mark.parametrize("shape", [(4, 64, 48), (3, 8, 100), (2, 1, 1)])
def test_images_of_any_size_and_channels_have_features(cache, wanted, shape):
    dataset = noise_images(shape, labels=[0, 1] * 30)
    found = fit_features(dataset, wanted)(raw(dataset, "train"))
    assert len(found) == 60 and bool(found.isfinite().all())
    torch.testing.assert_close(found.mean(dim=0), torch.zeros_like(found[0]), atol=1e-8, rtol=0.0)


def test_small_networks_see_large_images_small(monkeypatch):
    seen = []

    class Watched(nn.Module):
        def features(self, images):
            seen.append(tuple(images.shape[1:]))
            return images.mean(dim=(2, 3))

    monkeypatch.setattr("diffusion.feature_fitting.random_network", lambda channels: Watched())
    for shape in ((4, 64, 48), (1, 8, 100), (3, 32, 32)):
        fit_features(noise_images(shape), "random")
    assert seen == [(4, 32, 32), (1, 8, 32), (3, 32, 32)]


def test_inception_without_its_weights_is_one_line_with_the_remedy(monkeypatch):
    def no_network(**_):
        raise URLError("no route\nto host")

    monkeypatch.setattr(torchvision.models, "inception_v3", no_network)
    with pytest.raises(InputError) as caught:
        fit_features(noise_images(), "inception")
    message = str(caught.value)
    assert message.startswith("--metrics.features inception") and "no route to host" in message
    assert f"{torch.hub.get_dir()}/checkpoints" in message and "\n" not in message
    file = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    assert f"put {file} into" in message and "give random" in message


@pytest.mark.parametrize(("channels", "colours"), [(1, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_inception_is_shown_three_colours_between_minus_1_and_1(monkeypatch, channels, colours):
    class MeanColours(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.transform_input, self.fc = True, nn.Linear(3, 1)

        def forward(self, images):
            assert images.shape[1:] == (3, 299, 299) and not self.transform_input and not self.training
            return self.fc(images.mean(dim=(2, 3)))

    monkeypatch.setattr(torchvision.models, "inception_v3", MeanColours)
    dataset = noise_images((channels, 20, 16), count=8)
    features = fit_features(dataset, "inception")
    found = of_test(features, dataset) * features.std + features.mean
    means = (raw(dataset, "test") / 127.5 - 1.0).mean(dim=(2, 3))
    torch.testing.assert_close(found, means[:, colours], atol=0.01, rtol=0.0)


def test_features_on_another_device_are_a_copy(digits, trained):
    features, _ = trained
    expected = of_test(features, digits)
    copy = features.to("cpu")
    assert torch.equal(of_test(copy, digits), expected)
    for weight in copy.network.parameters():
        weight.fill_(0.0)
    assert torch.equal(of_test(features, digits), expected)
    assert features.to("meta").mean.is_meta and not features.mean.is_meta
    assert torch.equal(of_test(features, digits), expected)


def test_a_data_set_takes_its_features_along(digits, trained):
    dataset = replace(digits, features=trained[0])
    expected = of_test(trained[0], digits)
    for other in (dataset.to("cpu"), pickle.loads(pickle.dumps(dataset))):
        assert other.features.name == "classifier" and other.features.accuracy == trained[0].accuracy
        assert torch.equal(of_test(other.features, digits), expected)
    assert digits.to("cpu").features is None
