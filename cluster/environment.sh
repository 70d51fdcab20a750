# Read by every shell of the cluster's machines, and so by Ray and by all that Ray starts.
. ~/.ray-ddpm.sh  # RAY_DDPM_STORAGE, from the top of the cluster's YAML
export PATH="${RAY_DDPM_VENV:-$HOME/.ray-ddpm-venv}/bin:$PATH"
export PYTHONPATH="$HOME/ray-ddpm"
export RAY_ADDRESS=auto  # the cluster that runs here, instead of a Ray of one's own
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_DDPM_CLUSTER_CONFIG="$HOME/ray_bootstrap_config.yaml"  # how far the cluster can grow
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000  # drivers run on the head, and they alone talk to MLflow
