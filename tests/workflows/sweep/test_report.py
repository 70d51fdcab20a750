"""report.html of a sweep."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diffusion.evaluation.sampler_choice import MeasuredSampler, choose_sampler
from workflows.sweep.champion import Champion
from workflows.sweep.decision import Decision
from workflows.sweep.report import write_report
from workflows.sweep.trial_records import TrialRecords


class ParsedPage(HTMLParser):
    """Collects the sources of images and the text, and counts table rows."""

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
        records.start(f"t{number}", params)
        if status != "pruned":
            metrics = {"objective": 1.0 + number, "val/mse": 0.2 - 0.1 * number}
            records.add_evaluation(f"t{number}", 10, metrics)
        records.end(f"t{number}", status, "", 1.0)
    metrics = {
        "test/sample_distance": 0.125,
        "test/sample_distance_se": 0.0625,
        "test/sample_distance_floor": 0.03125,
    }
    reasons = ("chosen over trial t<1>, since its samples are closer",)
    confirmed = {"t0": {"sample/distance": 0.1}, "t1": {"sample/distance": 0.3}}
    champion = Champion("t0", 1.0, 10, metrics, Decision(("t0",), {}, ()), reasons, confirmed, "f", folder)
    return directory, records, champion


def write_and_parse(sweep, correlations, names=("schedule.kind", "training.learning_rate")):
    directory, records, champion = sweep
    text = write_report(directory, records, names, champion, correlations).read_text()
    return text, ParsedPage(text)


def test_the_report_shows_quality_by_network_evaluations_if_it_was_measured(sweep):
    directory, records, champion = sweep
    assert "quality of the samples by network evaluations" not in write_and_parse(sweep, {})[0]
    choice = choose_sampler([MeasuredSampler("ddpm", 20, 20, 0.3, 0.01, 0.7, 0.01)], num_samples=321)
    champion = replace(champion, samplers=choice)
    text, page = write_and_parse((directory, records, champion), {})
    assert "quality of the samples by network evaluations" in text and "with 321 samples" in " ".join(
        page.words
    )


def test_the_report_has_every_trial_and_the_champions_metrics_with_error_and_floor(sweep):
    text, page = write_and_parse(sweep, {})
    words = " ".join(page.words)
    assert "4 trials" in words and "1 pruned" in words and "trial t0" in words
    assert re.search(r"test/sample_distance\s+0.125\s+0.062\s+0.03125", words)
    assert all(f"t{number}" in page.words for number in range(4))
    assert page.rows == 1 + 1 + 1 + 4
    assert "too few trials" in words


def test_the_report_links_to_no_file_except_the_animation(sweep):
    directory, *_ = sweep
    _, page = write_and_parse(sweep, {})
    links = [source for source in page.sources if not source.startswith("data:image/png;base64,")]
    assert links == ["champion/animation.gif"] and (directory / links[0]).exists()
    assert len(page.sources) == 5


def test_the_report_says_why_this_model_and_what_mse_would_have_picked(sweep):
    text, page = write_and_parse(sweep, {})
    assert "chosen over trial t<1>, since its samples are closer." in page.words and "t<1>" not in text
    assert (
        "The mean squared error would have picked trial t1: place 2 of 2 by the objective, sample distance "
        "0.3 against 0.1."
    ) in page.words


def test_markup_in_names_is_escaped(sweep):
    text, page = write_and_parse(sweep, {})
    assert "a<b>" in page.words and "/my/<data>" in page.words
    assert "<b>" not in text and "<data>" not in text


def test_pairs_of_samples_and_training_images_are_shown_if_there_are_any(sweep):
    Image.new("L", (8, 8)).save(sweep[2].directory / "nearest.png")
    _, page = write_and_parse(sweep, {100: 0.5, 200: -0.25})
    assert len(page.sources) == 6
    assert "+0.50 at 100 updates, -0.25 at 200 updates" in " ".join(page.words)


def test_a_sweep_that_searches_nothing_has_a_report_too(sweep):
    _, page = write_and_parse(sweep, {}, names=())
    assert len(page.sources) == 5
    assert Path(sweep[0] / "report.html").exists()
