"""Denoising diffusion: the mathematics, the networks and the data. Knows no Ray, MLflow or ONNX."""
