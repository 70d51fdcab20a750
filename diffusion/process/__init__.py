"""The mathematics of diffusion: noise schedules, the forward process, its posterior, and the samplers.

`schedules`, `posterior`, `samplers` and `schedule_checks` need only numpy, because the exported sampler
uses them without PyTorch; `forward` and `generate` use PyTorch.
"""
