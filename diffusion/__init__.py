"""Denoising diffusion: the mathematics, the networks and the data. Knows no Ray, MLflow or ONNX.

Where the seeds' formulas stand, each once, with the equation of DDPM (arXiv:2006.11239) that it is. What
a seed prints otherwise than the paper is said there, and shown in tests/diffusion/test_seeds.py.

    formula                                        DDPM               seeds            here
    beta_t                                         Section 4          003              betas
    alpha_t, alpha-bar_t                           before Eq. 4       000, 004         schedules.NoiseSchedule
    q(x_t | x_{t-1})                               Eq. 2              000 to 004       process.q_step
    q(x_t | x_0)                                   Eq. 4              000, 002, 004    process.q_sample
    q(x_{t-1} | x_t, x_0)                          Eqs. 6 and 7       004              process.q_posterior
    p(x_{t-1} | x_t) and its sigma_t               Section 3.2        000, 001, 004    reverse
    x_0 and v from epsilon, and the score          Eqs. 4 and 15      001, 004         process.to_x_0, ...
    -ln p <= L = L_T + sum of L_{t-1} + L_0        Eqs. 3, 5, 8, 13   000, 001, 002    variational
    L_simple                                       Eq. 14             000, 002, 003    objectives
    sampling, x_T to x_0                           Eq. 11, Alg. 2     000, 002 to 004  sampling
    sigma_t with eta                               (DDIM, Eq. 16)     003              sampling
    sines and cosines of t, and of coordinates     -                  000, 004         embeddings
"""
