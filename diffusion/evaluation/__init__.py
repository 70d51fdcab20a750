"""Metrics of a trained denoiser: likelihood bounds and sample quality."""
