"""The page of a sweep."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from workflows.champion import Champion
from workflows.records import TrialRecords
from workflows.report import write_report


class Page(HTMLParser):
    """Counts what is open, and keeps the images' sources and the text."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.words, self.rows = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.rows += tag == "tr"
        if tag == "img":
            self.sources.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def sweep(tmp_path):
    directory = tmp_path / "a<b>"
    folder = directory / "champion"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "samples.png")
    Image.new("L", (8, 8)).save(folder / "animation.gif")
    records = TrialRecords(directory)
    for number, (status, kind) in enumerate(
        [("finished", "linear"), ("stopped", "cosine"), ("pruned", "linear"), ("diverged", "cosine")]
    ):
        params = {
            "metrics.objective": "val/elbo_window",
            "data.name": "/my/<data>",
            "schedule.kind": kind,
            "training.learning_rate": 1e-4 * 10**number,
        }
        records.begin(f"t{number}", params)
        if status != "pruned":
            records.evaluated(f"t{number}", 10, {"objective": 1.0 + number, "val/mse": 0.1})
        records.end(f"t{number}", status, "", 1.0)
    metrics = {
        "test/sample_distance": 0.125,
        "test/sample_distance_se": 0.0625,
        "test/sample_distance_floor": 0.03125,
    }
    return directory, records, Champion("t0", metrics, {"t0": 0.1}, "f", folder)


def page(sweep, correlations, names=("schedule.kind", "training.learning_rate")):
    directory, records, champion = sweep
    text = write_report(directory, records, names, champion, correlations).read_text()
    return text, Page(text)


def test_the_page_holds_every_trial_and_the_champions_figures_with_error_and_floor(sweep):
    text, read = page(sweep, {})
    words = " ".join(read.words)
    assert "4 trials" in words and "1 pruned" in words and "trial t0" in words
    assert re.search(r"test/sample_distance\s+0.125\s+0.062\s+0.03125", words)
    assert all(f"t{number}" in read.words for number in range(4))
    assert read.rows == 1 + 1 + 1 + 4
    assert "too few trials" in words


def test_the_page_needs_nothing_from_elsewhere_but_the_animation_beside_it(sweep):
    directory, *_ = sweep
    _, read = page(sweep, {})
    links = [source for source in read.sources if not source.startswith("data:image/png;base64,")]
    assert links == ["champion/animation.gif"] and (directory / links[0]).exists()
    assert len(read.sources) == 5


def test_names_with_signs_of_markup_are_shown_as_they_are(sweep):
    text, read = page(sweep, {})
    assert "a<b>" in read.words and "/my/<data>" in read.words
    assert "<b>" not in text and "<data>" not in text


def test_pairs_of_samples_and_training_images_are_shown_where_there_are_any(sweep):
    Image.new("L", (8, 8)).save(sweep[2].directory / "nearest.png")
    _, read = page(sweep, {100: 0.5, 200: -0.25})
    assert len(read.sources) == 6
    assert "+0.50 at 100 updates, -0.25 at 200 updates" in " ".join(read.words)


def test_a_sweep_of_one_config_has_a_page_too(sweep):
    _, read = page(sweep, {}, names=())
    assert len(read.sources) == 5
    assert Path(sweep[0] / "report.html").exists()
