"""Experiment tracking: the interface (`tracker`), and MLflow, with registered models and a local server."""
