"""Data loading of a run; image folders larger than memory are decoded by Ray Data."""
