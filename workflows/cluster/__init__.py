"""Tools for clusters, in addition to Ray's; see `python -m workflows.cluster --help`."""
