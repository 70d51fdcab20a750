"""Hyperparameter sweeps, from the command line's options to an exported champion and a report.

In the order in which a sweep uses them:

- `run_sweep` loads the data, opens the sweep's folder and tracker (`sweep_logger`) and calls the others.
- `tuner` runs the trials on Ray Tune: Optuna suggests their parameters, `asha` stops those that fall behind,
  and a callback passes Tune's events to the records, the tracker and to the live table (`table_view`).
- `trial` trains one config and reports to Tune after every evaluation.
- `trial_records` stores every trial in a `journal`, in trials.csv and in one folder per trial.
- `champion` evaluates the best trials again, optionally trains the best config for longer
  (`final_training`), and exports one model.
- `report` writes report.html.
"""
