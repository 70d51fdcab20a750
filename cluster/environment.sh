# Sourced by every shell on the cluster's machines, so Ray and all processes that it starts have this environment.
export PATH="${RAY_DDPM_VENV:-$HOME/.ray-ddpm-venv}/bin:$PATH"
export PYTHONPATH="$HOME/ray-ddpm"
export RAY_ADDRESS=auto  # join the cluster on this machine instead of starting a local Ray
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_DDPM_CLUSTER_CONFIG="$HOME/ray_bootstrap_config.yaml"  # the cluster's YAML, on the head
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000  # only drivers use MLflow, and they run on the head
