"""What is seen of a whole program, and the search space of the bare loop."""

import sys

import optuna
import pytest

from benchmarks.contender import ContenderFailed
from benchmarks.programs import watch
from benchmarks.sweeps import suggest


def test_a_programs_lines_time_memory_and_cpu_seconds_are_seen(tmp_path):
    """Those of its children count too."""
    child = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.5: pass"
    program = f"import subprocess, sys; print('first'); subprocess.run([sys.executable, '-c', {child!r}])"
    seen = watch([sys.executable, "-c", program], tmp_path)
    assert [line for _, line in seen.lines] == ["first"]
    assert seen.seconds > 0.5 and 0.2 < seen.cpu_seconds < 5.0
    assert max(memory for _, memory in seen.memory) > 1.0


def test_a_program_that_fails_says_why(tmp_path):
    with pytest.raises(ContenderFailed, match="no such thing"):
        watch([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path)


def test_the_bare_loop_searches_what_a_sweep_searches():
    trial = optuna.trial.FixedTrial({"rate": 0.01, "size": 64, "kind": "b", "blocks": 3})
    assert suggest(trial, "rate", (0.001, 0.1)) == 0.01
    assert suggest(trial, "size", (32, 64, 128)) == 64
    assert suggest(trial, "kind", ("a", "b")) == "b"
    assert suggest(trial, "blocks", (3, 6)) == 3
    assert isinstance(trial.distributions["rate"], optuna.distributions.FloatDistribution)
    assert trial.distributions["rate"].log
    assert isinstance(trial.distributions["blocks"], optuna.distributions.CategoricalDistribution)
