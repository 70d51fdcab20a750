"""Features of images: the classifier and its cache, random networks, Inception's weights."""

import pickle
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion.config import DataConfig
from diffusion.data.dataset import Dataset, DataSpec, Split, load_dataset
from diffusion.errors import InputError
from diffusion.evaluation import features as features_module
from diffusion.evaluation.features import degrade, fit_features


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The digits' classifier, and the cache folder that it was written to."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.evaluation.features.CACHE", cache)
        return fit_features(digits, "auto"), cache


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, with short training of classifiers."""
    monkeypatch.setattr("diffusion.evaluation.features.CACHE", tmp_path / "cache")
    monkeypatch.setattr(features_module, "CLASSIFIER_UPDATES", 5)
    monkeypatch.setattr(features_module, "DEGRADATION_UPDATES", 5)
    return tmp_path / "cache"


def raw(dataset, split):
    return torch.from_numpy(dataset.raw(getattr(dataset, split)[:]))


def on_test_split(features, dataset):
    return features(raw(dataset, "test"))


def noise_images(shape=(1, 8, 8), labels=None, count=60):
    """A data set of random bytes, with the same labels in all three splits."""
    generator = torch.Generator().manual_seed(0)
    labels = None if labels is None else torch.tensor(labels)
    mean, std = torch.tensor(127.5), torch.tensor(74.0)
    splits = [
        Split(torch.randint(256, (count, *shape), generator=generator).byte(), mean, std, labels)
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


@pytest.mark.parametrize("requested", ["auto", "classifier", "random", "inception"])
def test_points_have_no_features(gaussian_dataset, requested):
    assert fit_features(gaussian_dataset(), requested) is None


def test_digits_have_an_accurate_classifier(digits, trained):
    features, _ = trained
    assert features.name == "classifier"
    with torch.no_grad():
        predicted = features.network.trained((raw(digits, "val") / 8.0 - 1.0).float()).argmax(dim=1)
    accuracy = (predicted == digits.val.labels).double().mean().item()
    assert features.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert accuracy > 0.9


def test_a_classifier_is_read_from_the_cache_bit_for_bit(digits, trained, monkeypatch):
    features, cache = trained
    monkeypatch.setattr("diffusion.evaluation.features.CACHE", cache)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: pytest.fail("it was trained again"))
    for requested in ("auto", "classifier"):
        again = fit_features(digits, requested)
        assert torch.equal(on_test_split(again, digits), on_test_split(features, digits))
        assert torch.equal(again.mean, features.mean) and torch.equal(again.std, features.std)
        assert again.accuracy == features.accuracy


@pytest.mark.parametrize("end", [0, 5, 1000, -1])
def test_a_classifier_is_trained_again_if_its_cached_file_is_truncated(digits, cache, end):
    features = fit_features(digits, "auto")
    (file,) = (cache / "features").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:end])
    lines = []
    again = fit_features(digits, "auto", lines.append)
    assert lines == ["training the network whose features images are compared by (classifier)"]
    assert torch.equal(on_test_split(again, digits), on_test_split(features, digits))
    assert [each.read_bytes() for each in (cache / "features").iterdir()] == [whole]


@pytest.mark.parametrize("foreign", ["no accuracy", "other shapes"])
def test_a_cached_file_of_another_kind_has_no_effect(digits, cache, foreign):
    features = fit_features(digits, "auto")
    (file,) = (cache / "features").iterdir()
    weights = load_file(file)
    if foreign == "no accuracy":
        save_file(weights, file)
    else:
        save_file({**weights, "head.bias": torch.zeros(3)}, file, {"accuracy": "0.5"})
    assert torch.equal(on_test_split(fit_features(digits, "auto"), digits), on_test_split(features, digits))


def test_each_data_set_has_its_own_file(digits, cache):
    other = load_dataset(DataConfig(name="digits", val_fraction=0.2))
    for dataset in (digits, other, digits):
        fit_features(dataset, "auto")
    names = {file.stem.split("-")[0] for file in (cache / "features").iterdir()}
    assert names == {digits.spec.fingerprint, other.spec.fingerprint}


def test_a_cache_that_cannot_be_written_is_not_needed(digits, cache):
    expected = on_test_split(fit_features(digits, "auto"), digits)
    (file,) = (cache / "features").iterdir()
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("in the way")
    lines = []
    assert torch.equal(on_test_split(fit_features(digits, "auto", lines.append), digits), expected)
    assert len(lines) == 2 and f"{file.parent} cannot be written (File exists)" in lines[1]


def test_a_cache_on_a_full_disk_is_not_needed(digits, cache, monkeypatch):
    """safetensors raises its own error for it, as for a folder without write permission."""

    def disk_full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(features_module, "save_file", disk_full)
    assert fit_features(digits, "auto").name == "classifier"


def test_images_without_classes_have_features_of_degradations(cache):
    lines = []
    features = fit_features(noise_images(), "auto", lines.append)
    assert features.name == "degradations" and features.accuracy is None
    assert lines == ["training the network whose features images are compared by (degradations)"]
    again = fit_features(noise_images(), "auto", lines.append)
    assert len(lines) == 1, "it is read from the cache"
    assert all(map(torch.equal, features.network.parameters(), again.network.parameters()))


def test_each_way_to_degrade_an_image_changes_what_it_says():
    """Blur lowers the variance, noise raises it, a tint moves channels, a band is from the next image."""
    images = 0.5 * torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    same, blurred, noisy, tinted, foreign, torn = (
        degrade(images, torch.full((200,), how)) for how in range(6)
    )
    assert torch.equal(same, images)
    assert blurred.var() < 0.9 * images.var() < images.var() < 0.9 * noisy.var()
    assert tinted.mean(dim=(2, 3)).std() > 3.0 * images.mean(dim=(2, 3)).std()
    from_next = (foreign == images.roll(1, 0)).all(dim=1).all(dim=2).float().mean()
    assert 0.2 < from_next < 0.6
    assert torch.equal(torn.sort(dim=3).values, images.sort(dim=3).values) and not torch.equal(torn, images)
    assert max(each.abs().max() for each in (noisy, tinted)) <= 1.0


@pytest.mark.parametrize("requested", ["auto", "random"])
def test_features_neither_use_nor_change_the_global_random_state(digits, cache, requested):
    """For auto, a classifier is trained each time."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(on_test_split(fit_features(digits, requested), digits))
        assert torch.equal(torch.get_rng_state(), before)
        for file in (cache / "features").glob("*"):
            file.unlink()
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "labels",
    [None, [0] * 60, [0] * 41 + [1] * 19, [0] * 30 + [2] * 30],
    ids=["no labels", "one class", "one of 19", "one of none"],
)
def test_a_classifier_without_enough_images_of_each_class_is_refused_in_one_line(labels, cache):
    dataset = noise_images(labels=labels)
    with pytest.raises(InputError) as caught:
        fit_features(dataset, "classifier")
    message = str(caught.value)
    assert message.startswith("--metrics.features classifier: noise needs two classes")
    assert "give degradations" in message and "\n" not in message
    assert fit_features(dataset, "auto").name == "degradations"


def test_twenty_images_of_a_class_are_enough(cache):
    assert fit_features(noise_images(labels=[0] * 40 + [1] * 20), "auto").name == "classifier"


def test_a_validation_split_without_labels_has_no_classifier(cache):
    dataset = noise_images(labels=[0, 1] * 30)
    assert fit_features(replace(dataset, val=Split(dataset.val[:])), "auto").name == "degradations"


@pytest.mark.parametrize("requested", ["auto", "random"])
def test_features_of_the_training_split_have_mean_0_and_variance_1(digits, trained, requested):
    """On average: those of a classifier, and the random ones beside it, have half the variance each."""
    features = trained[0] if requested == "auto" else fit_features(digits, requested)
    values = features(raw(digits, "train"))
    assert values.dtype == torch.float64
    torch.testing.assert_close(values.mean(dim=0), torch.zeros_like(features.mean), atol=1e-9, rtol=0.0)
    variances = values.var(dim=0)
    if requested == "random":
        torch.testing.assert_close(variances, torch.ones_like(variances), atol=1e-9, rtol=0.0)
    else:
        halves = torch.stack([variances[:64].sum(), variances[64:].sum()])
        torch.testing.assert_close(halves, torch.full_like(halves, len(variances) / 2.0))


def test_a_feature_that_never_varies_is_0(monkeypatch):
    class Brightness(nn.Module):
        def features(self, images):
            brightness = images.mean(dim=(1, 2, 3))
            return torch.stack([brightness, torch.full_like(brightness, 0.3)], dim=1)

    monkeypatch.setattr("diffusion.evaluation.features.random_network", lambda channels: Brightness())
    dataset = noise_images()
    values = on_test_split(fit_features(dataset, "random"), dataset)
    assert values[:, 0].std() > 0.5 and not values[:, 1].any()


def test_features_do_not_depend_on_the_batch(digits, trained):
    features, images = trained[0], raw(digits, "train")
    alone = torch.cat([features(image) for image in images[:30].split(1)])
    torch.testing.assert_close(alone, features(images)[:30], atol=1e-4, rtol=0.0)


def test_features_do_not_depend_on_the_range_of_the_pixels(digits):
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
        *(on_test_split(fit_features(each, "random"), each) for each in (one, other)),
        atol=1e-3,
        rtol=0.0,
    )


@pytest.mark.parametrize("requested", ["classifier", "degradations", "random"])
@pytest.mark.parametrize("shape", [(4, 64, 48), (3, 8, 100), (2, 1, 1)])
def test_images_of_any_size_and_channels_have_features(cache, requested, shape):
    dataset = noise_images(shape, labels=[0, 1] * 30)
    values = fit_features(dataset, requested)(raw(dataset, "train"))
    assert len(values) == 60 and bool(values.isfinite().all())
    torch.testing.assert_close(values.mean(dim=0), torch.zeros_like(values[0]), atol=1e-8, rtol=0.0)


def test_large_images_are_shrunk_for_small_networks(monkeypatch):
    seen = []

    class Recorder(nn.Module):
        def features(self, images):
            seen.append(tuple(images.shape[1:]))
            return images.mean(dim=(2, 3))

    monkeypatch.setattr("diffusion.evaluation.features.random_network", lambda channels: Recorder())
    for shape in ((4, 64, 48), (1, 8, 100), (3, 32, 32)):
        fit_features(noise_images(shape), "random")
    assert seen == [(4, 32, 32), (1, 8, 32), (3, 32, 32)]


def test_inception_without_its_weights_is_refused_in_one_line_with_the_remedy(monkeypatch):
    def offline(**_):
        raise URLError("no route\nto host")

    monkeypatch.setattr(torchvision.models, "inception_v3", offline)
    with pytest.raises(InputError) as caught:
        fit_features(noise_images(), "inception")
    message = str(caught.value)
    assert message.startswith("--metrics.features inception") and "no route to host" in message
    assert f"{torch.hub.get_dir()}/checkpoints" in message and "\n" not in message
    file = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    assert f"put {file} into" in message and "give random" in message


@pytest.mark.parametrize(("channels", "rgb"), [(1, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_inception_gets_three_channels_between_minus_1_and_1(monkeypatch, channels, rgb):
    class ChannelMeans(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.transform_input, self.fc = True, nn.Linear(3, 1)

        def forward(self, images):
            assert images.shape[1:] == (3, 299, 299) and not self.transform_input and not self.training
            return self.fc(images.mean(dim=(2, 3)))

    monkeypatch.setattr(torchvision.models, "inception_v3", ChannelMeans)
    dataset = noise_images((channels, 20, 16), count=8)
    features = fit_features(dataset, "inception")
    values = on_test_split(features, dataset) * features.std + features.mean
    means = (raw(dataset, "test") / 127.5 - 1.0).mean(dim=(2, 3))
    torch.testing.assert_close(values, means[:, rgb], atol=0.01, rtol=0.0)


def test_features_on_another_device_are_a_copy(digits, trained):
    features, _ = trained
    expected = on_test_split(features, digits)
    copy = features.to("cpu")
    assert torch.equal(on_test_split(copy, digits), expected)
    for weight in copy.network.parameters():
        weight.fill_(0.0)
    assert torch.equal(on_test_split(features, digits), expected)
    assert features.to("meta").mean.is_meta and not features.mean.is_meta
    assert torch.equal(on_test_split(features, digits), expected)


def test_features_can_be_pickled(digits, trained):
    other = pickle.loads(pickle.dumps(trained[0]))
    assert other.name == "classifier" and other.accuracy == trained[0].accuracy
    assert torch.equal(on_test_split(other, digits), on_test_split(trained[0], digits))
