"""What a worker writes down with a checkpoint."""

from types import SimpleNamespace

import pytest

from workflows.training import worker
from workflows.training.worker import save_checkpoint


@pytest.mark.parametrize(("update", "objective"), [(10, 0.5), (15, None)])
def test_a_checkpoint_between_evaluations_has_no_objective(monkeypatch, tmp_path, update, objective):
    """With that of the last evaluation it would be taken for the best, which its weights are not."""
    written, facts = [], []
    writer = SimpleNamespace(save=lambda write, *arguments: (written.append(arguments), write(tmp_path)))
    monkeypatch.setattr(worker, "write_checkpoint", lambda folder, model, state, given: facts.append(given))
    state = SimpleNamespace(update=update, history=[{"update": 10, "metrics": {"objective": 0.5}}])
    model = SimpleNamespace(data=SimpleNamespace(fingerprint="f"))
    save_checkpoint(writer, model, state, workers=2)
    assert written == [(update, objective)]
    assert facts == [{"update": update, "objective": objective, "data_fingerprint": "f", "workers": 2}]
