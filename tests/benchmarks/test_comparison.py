"""The tables of `make bench`: ratios, rows that could not be measured, and what of an earlier run stays."""

import csv
from importlib import import_module

import pytest

from benchmarks import run, table
from benchmarks.comparison import Comparison, Options, Report, compare, hopeless, measure
from benchmarks.comparisons import gpu, heart, unet_training
from benchmarks.comparisons.growth import growth_row, slope
from benchmarks.contender import Contender
from benchmarks.table import COLUMNS, NOT_MEASURED, Unit, not_measured, read_summary, row, write_summary

SECONDS, RATE = Unit("s", goals={"them": "2"}), Unit("images/s", higher_is_better=True)


def test_the_columns_are_those_that_readers_know():
    assert ",".join(COLUMNS) == (
        "work,peer,unit,ours_median,peer_median,ratio_median,ratio_min,ratio_max,goal,hardware"
    )


def test_a_ratio_says_how_many_times_better_ours_is_turn_by_turn():
    ours, peers = [1.0, 2.0, 4.0], [3.0, 4.0, 4.0]
    faster = row("w", "them", SECONDS, ours, peers, goal="2")
    assert (faster.ratio_min, faster.ratio_median, faster.ratio_max) == ("1", "2", "3")
    assert (faster.ours_median, faster.peer_median, faster.goal) == ("2", "4", "2")
    more = row("w", "them", RATE, peers, ours)
    assert (more.ratio_min, more.ratio_median, more.ratio_max) == ("1", "2", "3")


def found(seconds):
    return [{"s": value, "images/s": 1.0 / value} for value in seconds]


def test_the_best_of_the_contenders_of_either_side_is_compared():
    nobody = Contender("nowhere:nothing")
    works = Comparison("w", {"a": nobody, "b": nobody}, {"them": {"c": nobody, "d": nobody}}, [SECONDS, RATE])
    measured = {
        "a": found([4.0, 4.0]),
        "b": found([1.0, 1.0]),
        "c": found([9.0, 9.0]),
        "d": found([2.0, 4.0]),
    }
    (seconds, rate), chosen = compare(works, measured)
    assert chosen == {"them": "d"}
    assert (seconds.ratio_median, rate.ratio_median) == ("3", "3")
    assert (seconds.goal, rate.goal) == ("2", "")


@pytest.mark.parametrize("missing", ["ours", "them"])
def test_what_could_not_be_run_is_a_row_that_says_so(missing):
    nobody = Contender("nowhere:nothing")
    measured = {"ours": found([1.0]), "them": found([2.0])}
    del measured[missing]
    rows, chosen = compare(Comparison("w", {"ours": nobody}, {"them": {"them": nobody}}, [SECONDS]), measured)
    assert rows == [not_measured("w", "them", "s", "2")]
    assert rows[0].ratio_median == rows[0].ours_median == NOT_MEASURED


def test_contenders_take_turns_in_processes_of_their_own():
    """One that is kept counts on, one that is fresh starts anew, and one that fails is left out."""
    kept = Contender("tests.benchmarks.counting:count", {"step": 2.0})
    fresh = Contender("tests.benchmarks.counting:count", {"step": 3.0}, fresh=True)
    broken = Contender("tests.benchmarks.counting:count", {"no_such": 1})
    measured = measure({"kept": kept, "fresh": fresh, "broken": broken}, 2)
    assert [each["count"] for each in measured["kept"]] == [2.0, 4.0]
    assert [each["count"] for each in measured["fresh"]] == [3.0, 3.0]
    assert set(measured) == {"kept", "fresh"}
    assert measure({}, 2) == {}


def test_a_contender_that_cannot_become_the_best_of_its_side_takes_no_further_turns():
    slow, fast = ({"step": step} for step in (100.0, 1.0))
    contenders = {
        name: Contender("tests.benchmarks.counting:count", arguments, fresh=True)
        for name, arguments in (("slow", slow), ("fast", fast), ("alone", slow))
    }
    measured = measure(contenders, 4, [("slow", "fast"), ("alone",)], Unit("count"))
    assert {name: len(figures) for name, figures in measured.items()} == {"slow": 2, "fast": 4, "alone": 4}
    works = Comparison("w", {"fast": contenders["fast"]}, {"them": contenders}, [Unit("count")])
    assert compare(works, measured)[1] == {"them": "fast"}, "those with fewer turns are not chosen"


@pytest.mark.parametrize(
    ("second", "given_up"),
    [([1.2, 1.3], []), ([2.0, 1.25], []), ([2.0, 1.5], ["b"])],
)
def test_one_good_turn_keeps_a_contender(second, given_up):
    assert hopeless(["a", "b"], SECONDS, {"a": found([1.0, 1.1]), "b": found(second)}) == given_up
    assert hopeless(["a", "b"], RATE, {"a": found([1.0, 1.1]), "b": found(second)}) == given_up


@pytest.mark.parametrize(
    ("distances", "blurred"), [([], False), ([0.02, 0.01, 0.02, 0.01], False), ([0.02] * 3, True)]
)
def test_seeds_are_trained_while_the_median_may_be_sharp(distances, blurred):
    assert heart.is_too_blurred([{heart.MEAN_DISTANCE: each} for each in distances]) == blurred


def test_the_ladder_ends_where_both_are_sharp_and_goes_on_where_both_are_blurred(monkeypatch):
    trained = []

    def make(name):
        return lambda num_updates, seed: (name, num_updates, seed)

    def measure(contenders, repeats):
        trained.extend(contenders.values())
        sharp_from = {"ours": 10_000, "tutorial": 15_000}
        return {
            name: [
                {heart.MEAN_DISTANCE: 0.01 if updates >= sharp_from[name] else 0.02, "s": 1.0, "CPU s": 1.0}
            ]
            for name, updates, _ in contenders.values()
        }

    monkeypatch.setattr(heart, "ours", make("ours"))
    monkeypatch.setattr(heart, "tutorial", make("tutorial"))
    monkeypatch.setattr(heart, "measure", measure)
    monkeypatch.setattr(heart, "LADDER", (5000, 10_000, 15_000, 25_000))
    rows = heart.time_to_sharpness(Report())
    assert [each.ratio_median for each in rows] == ["1", "1"]
    seeds = {}
    for name, updates, _ in trained:
        seeds[name, updates] = seeds.get((name, updates), 0) + 1
    assert seeds == {
        ("ours", 5000): 3,
        ("tutorial", 5000): 3,
        ("ours", 10_000): 5,
        ("tutorial", 10_000): 3,
        ("tutorial", 15_000): 5,
    }


@pytest.mark.parametrize(
    ("sharp", "ratios", "said"),
    [
        (("ours",), ["2", "2"], "its longest training stands for it"),
        (("tutorial",), [NOT_MEASURED] * 2, "Not reached by: ours."),
        ((), [NOT_MEASURED] * 2, "Not reached by: ours and tutorial."),
    ],
)
def test_a_peer_that_never_gets_as_sharp_is_compared_by_its_longest_training(
    monkeypatch, sharp, ratios, said
):
    def measure(contenders, repeats):
        seconds = {"ours": 1.0, "tutorial": 2.0}
        return {
            name: [{heart.MEAN_DISTANCE: 0.01 if name in sharp else 0.02, "s": value, "CPU s": value}]
            for name, value in seconds.items()
            if name in contenders
        }

    monkeypatch.setattr(heart, "ours", lambda num_updates, seed: None)
    monkeypatch.setattr(heart, "tutorial", lambda num_updates, seed: None)
    monkeypatch.setattr(heart, "measure", measure)
    report = Report()
    assert [each.ratio_median for each in heart.time_to_sharpness(report)] == ratios
    assert said in "\n".join(report.lines)


def test_a_benchmark_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def fails(options):
        raise RuntimeError("no such peer")

    monkeypatch.setattr(heart, "run", fails)
    monkeypatch.setattr(gpu, "run", lambda options: Report([not_measured(gpu.TRAINING, "them", "s")]))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "write_summary", lambda rows, order: None)
    assert run.main(["heart", "gpu"]) == 1
    assert not (tmp_path / "heart.md").exists() and "not measured" in (tmp_path / "gpu.md").read_text()
    assert "no such peer" in capsys.readouterr().err


def test_rows_replace_those_of_the_same_work_and_keep_the_order(tmp_path):
    first = [row(work, "them", SECONDS, [1.0], [2.0]) for work in ("b", "a")]
    write_summary(first, ["a", "b"], tmp_path)
    write_summary([row("b", "them", SECONDS, [1.0], [5.0])], ["a", "b"], tmp_path)
    assert [(each.work, each.ratio_median) for each in read_summary(tmp_path)] == [("a", "2"), ("b", "5")]
    with (tmp_path / "summary.csv").open() as file:
        assert next(csv.reader(file)) == COLUMNS


def test_what_another_machine_measured_stays_where_this_one_cannot(tmp_path, monkeypatch):
    write_summary([row("w", "them", SECONDS, [1.0], [2.0])], [], tmp_path)
    write_summary([not_measured("w", "them", "s")], [], tmp_path)
    assert read_summary(tmp_path)[0].ours_median == NOT_MEASURED  # this machine's own figure is out of date
    write_summary([row("w", "them", SECONDS, [1.0], [2.0])], [], tmp_path)
    monkeypatch.setattr(table, "hardware", lambda: "another machine")
    write_summary([not_measured("w", "them", "s")], [], tmp_path)
    assert read_summary(tmp_path)[0].ratio_median == "2"


def test_the_page_names_versions_and_all_rows():
    report = Report([not_measured("w", "them", "s", "2")], ["", "more"])
    page = report.page("Title", "What it is.", 5)
    assert "torch 2." in page and "| w | them | s | not measured |" in page and page.endswith("more\n")


def test_a_slope_is_the_power_by_which_time_grows():
    sizes = (2, 4, 16)
    assert slope(sizes, [3.0 * size**2 for size in sizes]) == pytest.approx(2.0)
    assert slope(sizes, [5.0, 5.0, 5.0]) == pytest.approx(0.0)
    linear, square = [[2.0, 4.0, 16.0]], [[4.0, 16.0, 256.0]]
    line = growth_row("w", "them", sizes, linear, square, "at most 1")
    assert (line.unit, line.ours_median, line.peer_median) == ("log-log slope", "1", "2")
    assert line.ratio_median == "8", "over the whole range they have grown by 64, we by 8"


def test_every_benchmark_has_a_title_a_text_and_works():
    works = []
    for name in run.NAMES:
        module = import_module(f"benchmarks.comparisons.{name}")
        assert module.TITLE and module.__doc__.partition("\n\n")[2], name
        works += module.WORKS
    assert len(set(works)) == len(works)


def test_an_unknown_benchmark_is_bad_input(capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["hart"])
    assert caught.value.code == 2 and "hart: give any of heart, " in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_not_measured(monkeypatch):
    monkeypatch.setattr("export.session.cuda_unavailable_reason", lambda: "there is none")
    report = gpu.run(Options(repeats=1))
    assert {each.work for each in report.rows} == set(gpu.WORKS)
    assert {each.ratio_median for each in report.rows} == {NOT_MEASURED}
    assert {each.hardware for each in report.rows} == {gpu.GPU}


def test_bf16_is_not_measured_on_a_cpu_without_it(monkeypatch):
    added = []
    monkeypatch.setattr(Report, "add", lambda self, works, repeats: added.append(works))
    monkeypatch.setattr(unet_training, "cpu_has_bf16", lambda: False)
    report = unet_training.run(Options())
    assert [works.work.rpartition(" ")[2] for works in added] == ["fp32", "fp32"]
    assert {each.work.rpartition(" ")[2] for each in report.rows} == {"bf16"}
    assert {each.ours_median for each in report.rows} == {NOT_MEASURED}
    assert "this CPU has no instructions for bf16" in "\n".join(report.lines)
