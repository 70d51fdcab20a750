"""What a person runs: sweeps on Ray, seen in MLflow."""
