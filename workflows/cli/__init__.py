"""Command lines of train.py and tune.py: flags, defaults, checks. Imports neither torch, ray nor mlflow."""
