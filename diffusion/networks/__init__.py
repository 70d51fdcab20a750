"""The denoising networks, an MLP and a U-Net, and the sinusoidal embeddings that both use."""
