"""The mathematics of diffusion: noise schedules, the forward process, its posterior, and the samplers.

`inpainting` and `image_start` sample around known values and from given samples, and `given` checks them.
Only `forward` and `generate` use PyTorch: the exported sampler uses the others without it.
"""
