"""Storage of a run's files in a local folder, on a shared mount or in a bucket."""
