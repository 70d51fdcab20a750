"""report.html: what it shows, that it needs nothing else, and that it holds up when things are missing."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.workflows.sweep.report.conftest import SPACE, TEST_METRICS, Trial, picture
from workflows.publishing.page import plotting_library

SESSION = {
    "git_revision": "abc123",
    "git_clean": False,
    "command": "workflows/tune.py --data 'a & b'",
    "packages": {"python": "3.11", "torch": None},
    "hardware": {"cpu": "CPU <1>", "cores": 2, "memory_gb": None, "gpus": []},
}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class ParsedPage(HTMLParser):
    """Elements with their attributes, and the text that a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.inside = [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).replace(" <wbr> ", "").split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "wbr":
            self.words.append("<wbr>")
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style", "title"} & set(self.inside):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def parse(sweep, **options):
    return ParsedPage(sweep.write(**options))


def test_the_first_screen_answers_the_five_questions(make_sweep):
    text = parse(make_sweep(), location_hint="http://server/#/runs").text
    first = text[: text.index("Its parameters")]
    assert "Sweep a-sweep: trial best won" in first
    assert "Trial best won because its samples are closer to the data" in first
    assert "Not as good as real data by AUC." in first
    assert "Does not copy training examples." in first
    assert "val/mse would have picked trial lowmse, number 3 of 4 by the objective" in first
    assert "python -m export.sampler" in first
    assert "5 trials: 3 finished, 1 stopped, 1 diverged" in first
    assert "http://server/#/runs" in text


def test_three_models_stand_side_by_side_with_their_measures(make_sweep):
    text = parse(make_sweep()).text
    part = text[text.index("Side by side", text.index("Next commands")) : text.index("All trials", 2000)]
    for words in ("★ champion trial best", "◆ MSE's pick trial lowmse", "■ runner-up trial second"):
        assert words in part
    assert "0.100 ± 0.010 0.500 ± 0.020 0.200 ± 0.010" in part, "confirmed distances, or the trial's own"


def test_every_trial_is_in_the_leaderboard_with_a_thumbnail_if_it_has_samples(make_sweep):
    sweep = make_sweep()
    page = parse(sweep)
    rows = [attributes for attributes in page.all("tr") if "data-status" in attributes]
    assert [row["data-status"] for row in rows] == ["finished"] * 3 + ["stopped", "diverged"]
    assert rows[0]["class"] == "champion"
    thumbnails = [image for image in page.all("img") if image.get("class") == "thumbnail"]
    assert [image["alt"] for image in thumbnails] == [
        f"Samples of trial {trial_id}" for trial_id in ("best", "second", "lowmse", "cut")
    ]
    assert "the loss is nan" in page.text and "behind the others" in page.text


def test_the_page_can_be_read_by_everybody(make_sweep):
    text = make_sweep().write()
    page = ParsedPage(text)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(image.get("alt") for image in page.all("img"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert all(plot.get("aria-label") for plot in page.all("div") if plot.get("role") == "img")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(next_ - level <= 1 for level, next_ in zip(levels, levels[1:], strict=False))
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)


def test_the_page_loads_nothing_and_is_small(make_sweep, many):
    sweep = make_sweep(many)
    text = sweep.write()
    assert len(text) < 6e6 and text.count(plotting_library()) == 1
    page = ParsedPage(text)
    sources = [
        value
        for _, each in page.elements
        for name, value in each.items()
        if name in ("src", "srcset", "poster")
    ]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not page.all("link") and not page.all("iframe")
    assert not any("src" in script for script in page.all("script"))
    style = "".join(re.findall("<style>(.*?)</style>", text, re.DOTALL))
    assert "url(" not in style and "@import" not in style


def test_names_from_outside_are_escaped(make_sweep):
    trials = {
        HOSTILE: Trial(1.0, 0.2, metrics={"sample/<b>": 1.0}),
        "b</script>": Trial(2.0, 0.1, reason=HOSTILE, params={"schedule.kind": HOSTILE}),
    }
    trials = {name.replace("/", "_"): trial for name, trial in trials.items()}
    sweep = make_sweep(trials, data_name="/" + HOSTILE)
    sweep.champion = replace(sweep.champion, reasons=(f"chosen over {HOSTILE}",), data_fingerprint=HOSTILE)
    sweep.write_run([SESSION | {"command": HOSTILE}])
    space = {**SPACE, "schedule.kind": (HOSTILE, "linear")}
    text = sweep.write(space=space, location_hint=HOSTILE)
    page = ParsedPage(text)
    assert "alert(1)" in page.text
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert not re.search(r"<script>alert|<img src=x", text)
    for block in re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL):
        assert "<" not in block
        json.loads(block)


def test_plotly_shows_markup_in_names_as_text(make_sweep):
    trials = {"best": Trial(1.0), "<b>x<_b>": Trial(2.0)}
    text = make_sweep(trials).write()
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    named = [trace["name"] for block in blocks for trace in json.loads(block)["data"] if "name" in trace]
    assert any("&lt;b&gt;x&lt;_b&gt;" in name for name in named)


def test_a_single_trial_has_a_report(make_sweep):
    sweep = make_sweep({"only": Trial(1.0, 0.1)})
    text = parse(sweep, space={}).text
    assert "Trial only won because no other trial has a usable model." in text
    assert "would have picked the same trial, only" in text and "1 trial: 1 finished" in text
    assert "Nothing was searched." in text and "there are 1." in text
    assert "runner-up" not in text


def test_pieces_that_are_missing_are_said_and_do_not_stop_the_report(make_sweep):
    sweep = make_sweep({"best": Trial(1.0), "second": Trial(2.0)})
    sweep.champion = replace(sweep.champion, metrics={}, confirmations={}, reasons=())
    shutil.rmtree(sweep.champion_folder)
    shutil.rmtree(sweep.directory / "trials")
    (sweep.directory / "run.json").unlink(missing_ok=True)
    text = parse(sweep).text
    assert text.count("There is no picture of its samples.") == 3
    assert "The command that ran the sweep was not recorded." in text
    assert "val/mse was not measured" in text and "Not compared with real data" in text


def test_a_picture_that_was_cut_short_is_left_out(make_sweep):
    sweep = make_sweep()
    path = sweep.champion_folder / "samples.png"
    path.write_bytes(path.read_bytes()[:60])
    assert "There is no picture of its samples." in parse(sweep).text


def test_an_interrupted_sweep_says_so_and_how_to_go_on(make_sweep):
    sweep = make_sweep()
    sweep.write_run([SESSION], num_trials=12)
    text = parse(sweep, interrupted=True).text
    assert "The sweep was interrupted after 5 of 12 trials" in text
    assert "python -m workflows.tune --resume --name a-sweep" in text
    assert "was interrupted" not in parse(sweep).text


def test_every_session_of_a_resumed_sweep_has_its_command(make_sweep):
    sweep = make_sweep()
    sweep.write_run([SESSION, SESSION | {"command": "workflows/tune.py --resume"}])
    text = parse(sweep).text
    assert "The commands that ran the sweep, one for each session:" in text
    assert "python workflows/tune.py --data 'a & b'" in text and "python workflows/tune.py --resume" in text
    assert (
        "git revision abc123 , with uncommitted changes" in text and "CPU <1>, 2 cores; no NVIDIA GPU" in text
    )


@pytest.mark.parametrize(
    ("kind", "classes", "words"),
    [
        ("image", ["a", "b"], "each column is a class"),
        ("points", ["a", "b"], "each colour is a class"),
        ("points", None, "Points have no pictures to lay beside each other"),
        ("image", None, "There is no picture of samples beside their nearest training images"),
    ],
)
def test_captions_fit_the_data(make_sweep, kind, classes, words):
    sweep = make_sweep()
    tree = {"data": {"kind": kind, "classes": classes}}
    (sweep.champion_folder / "config.json").write_text(json.dumps(tree))
    assert words in parse(sweep).text


def test_pairs_of_samples_and_training_images_say_which_is_which(make_sweep):
    sweep = make_sweep()
    picture(sweep.champion_folder / "nearest.png")
    page = parse(sweep)
    assert "below each sample is the training image nearest to it" in page.text
    assert any("below each of them the training image" in image["alt"] for image in page.all("img"))


def test_a_model_of_the_final_training_is_not_mistaken_for_its_trials(make_sweep):
    sweep = make_sweep()
    sweep.champion = replace(sweep.champion, objective=0.5)
    text = parse(sweep).text
    assert "trained longer" in text and "higher by 2.5 nats/dim" in text


def test_many_trials_leave_the_page_readable(make_sweep, monkeypatch, many):
    monkeypatch.setattr("workflows.sweep.report.write_report._MAX_THUMBNAILS", 3)
    page = parse(make_sweep(many))
    assert sum(image.get("class") == "thumbnail" for image in page.all("img")) == 3
    assert "The best 3 trials have pictures." in page.text


def test_floats_of_metrics_have_error_and_floor(make_sweep):
    text = parse(make_sweep()).text
    assert "test/sample_distance 0.125 ± 0.062 0.031 ± 0.062" in text
    assert set(TEST_METRICS) > {"test/sample_distance"}
