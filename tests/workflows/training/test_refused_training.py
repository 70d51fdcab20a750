"""train.py without a training: input that is refused, and dry runs. Nothing is written."""

import re

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from diffusion.data.dataset import load_dataset
from diffusion.data.sources import open_source
from workflows.cli.run_options import TrainOptions
from workflows.storage.run_record import RunRecord
from workflows.storage.storage import Storage


def test_a_dry_run_describes_the_training_and_writes_nothing(here, database):
    client = MlflowClient(database[1])
    runs_before = len(client.search_runs([each.experiment_id for each in client.search_experiments()]))
    status, output, errors = here(["--data", "heart", "--num-workers", "2", "--dry-run", *database])
    assert (status, errors) == (0, "")
    for words in (
        "10000 updates of 256",
        "5600 examples",
        "workers   2, each with 1 CPU thread",
        "alphas_cumprod",
    ):
        assert words in output
    assert re.search(r"about \d[\d.]* (s|min|h)\b", output) and "█" in output and "log-SNR" in output
    assert not list(here.folder.iterdir())
    assert (
        len(client.search_runs([each.experiment_id for each in client.search_experiments()])) == runs_before
    )


def test_too_many_workers_are_refused(here, database):
    message = here.refused(
        ["--data", "heart", "--num-workers", "4000", "--training.batch-size", "4000", *database]
    )
    assert message.startswith("error: --num-workers 4000: the cluster has ")


def test_half_precision_that_cpus_do_not_support_is_refused(here, database):
    message = here.refused(["--data", "heart", "--training.precision", "fp16", *database])
    assert "--training.precision fp16" in message and "bf16" in message


def images(folder, count=60, size=16):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def empty_folder(data):
    data.mkdir()


def corrupt_image(data):
    (images(data) / "30.png").write_bytes((data / "30.png").read_bytes()[:100])


def too_few_images(data):
    images(data, count=9)


def images_of_3(data):
    images(data, size=3)


def not_a_number(data):
    data.write_text("x,y,kind\n" + "1,2,a\n3,4,b\n" * 40 + "5,nan,a\n")


def not_a_table(data):
    data.write_bytes(b"\x00\x01\x02")


@pytest.mark.parametrize(
    ("make", "name", "arguments", "words"),
    [
        (empty_folder, "photos", "", ["photos holds no images"]),
        (corrupt_image, "photos", "", ["30.png", "--skip-bad-images"]),
        (too_few_images, "photos", "", ["9 examples: too few"]),
        (images_of_3, "photos", "", ["--image-size 3", "4 or more"]),
        (images, "photos", "--image-size 3", ["--image-size 3", "from 4"]),
        (
            images,
            "photos",
            "--network.channel-multipliers 1 2 2 2",
            ["--network.channel-multipliers", "4 levels", "16x16", "1 to 3"],
        ),
        (images, "photos", "--label-column kind", ["--label-column kind", "only tables"]),
        (not_a_number, "table.csv", "", ["table.csv", "row 81", "column y"]),
        (not_a_number, "table.csv", "--label-column colour", ["--label-column colour", "x, y, kind"]),
        (
            not_a_number,
            "table.csv",
            "--label-column kind --horizontal-flips",
            ["--horizontal-flips", "points"],
        ),
        (not_a_number, "table.csv", "--network.kind unet --label-column y", ["table.csv", "row"]),
        (not_a_table, "table.parquet", "", ["table.parquet cannot be read"]),
        (not_a_table, "gone.csv", "--data nowhere.csv", ["--data nowhere.csv"]),
    ],
)
def test_unusable_data_is_refused_in_one_line(here, database, make, name, arguments, words):
    make(here.folder / name)
    message = here.refused(["--data", name, *arguments.split(), *database])
    for word in words:
        assert word in message


def test_bad_images_can_be_skipped(here, database):
    corrupt_image(here.folder / "photos")
    small = ["--network.base-channels", "8", "--metrics.features", "random"]
    status, output, errors = here(
        ["--data", "photos", "--skip-bad-images", "--image-size", "8", *small, "--dry-run", *database]
    )
    assert (status, errors) == (0, "")
    train, val, test = map(
        int, re.search(r"(\d+) examples .* (\d+) for val.* (\d+) for testing", output).groups()
    )
    assert train + val + test == 59


@pytest.fixture
def stopped_run(here, database):
    """A stopped run on a table: only its record, without a training; returns the table and its rows."""
    rows = np.random.default_rng(0).normal(size=(200, 2))
    table = here.folder / "table.csv"
    np.savetxt(table, rows, delimiter=",", header="x,y", comments="")
    options = TrainOptions(data=str(table))
    config = options.with_preset(open_source(options.data_config()), {}).config()
    fingerprint = load_dataset(config.data).spec.fingerprint
    record = RunRecord("cut", "table", "0" * 32, config, fingerprint)
    record.write(Storage(str(here.folder / "runs")).child("cut"), "stopped")
    return table, rows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--training.learning-rate 0.5", ["--training.learning-rate 0.5", "0.001"]),
        ("--seed 7", ["--seed 7", "0"]),
        ("--network.dropout 0.5", ["--network.dropout 0.5", "0.0"]),
        ("--training.num-updates 20000", ["--training.num-updates 20000", "10000"]),
        ("--training.num-epochs 1", ["--training.num-updates", "10000"]),
        ("--data heart", ["--data heart", "table.csv"]),
        ("--num-workers 4000 --training.batch-size 4000", ["--training.batch-size 4000", "256"]),
        ("--init-from runs/cut", ["--init-from", "--resume"]),
    ],
)
def test_a_run_is_resumed_only_with_its_own_config(here, stopped_run, database, arguments, words):
    message = here.refused(["--resume", "--name", "cut", *arguments.split(), *database])
    for word in words:
        assert word in message


def test_a_run_is_not_resumed_with_data_that_have_changed(here, stopped_run, database):
    table, rows = stopped_run
    rows[17, 1] += 0.5
    np.savetxt(table, rows, delimiter=",", header="x,y", comments="")
    message = here.refused(["--resume", "--name", "cut", *database])
    assert "table.csv have changed" in message


def test_a_run_is_resumed_only_in_the_mlflow_store_that_has_it(here, stopped_run, database):
    message = here.refused(["--resume", "--name", "cut", *database])
    assert "--tracking-uri" in message and "has no run 000000" in message


def test_resuming_without_an_unfinished_run_is_refused(here):
    assert "--resume --name nope" in here.refused(["--resume", "--name", "nope"])
    assert "no unfinished run" in here.refused(["--resume"])
