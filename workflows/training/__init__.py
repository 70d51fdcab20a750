"""Runs one training: its workers on Ray Train, its checkpoints and its run log.

How a data-parallel training runs, from the outside in:

1. The driver (`run_training`, in the process of train.py) loads the data, plans the workers and opens the
   run.
2. `worker_group` starts the workers with Ray Train, and restarts them when one dies.
3. Each worker process (`worker`) loads the newest checkpoint and runs `diffusion.training.loop.Training`,
   in which each batch is divided among the workers. They share evaluations, too. Rank 0 writes checkpoints
   to the `checkpoint_store`.
4. Everything else passes through the `coordinator`, a small Ray actor. Rank 0 sends it events (evaluations,
   the end, errors) and its progress. The driver collects both several times a second, and `run_logger` writes
   them to the tracker, the terminal and the run record. In the other direction, every worker polls the
   coordinator for a signal: continue, restart, stop or abort.

A sweep uses `worker_group` in the same way, with other drivers, for trials with several workers and for its
final training.
"""
