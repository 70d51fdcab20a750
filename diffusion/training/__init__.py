"""Training of a denoiser: the loss, a single update, the training loop and checkpoints."""
