"""Diffusion: noise schedules, the prediction table, the denoiser, samplers, guidance and the training loss.

One contract carries it: `Denoise = (x, sigma) -> x0` with `x = x0 + sigma * noise`. Read `denoiser`,
`samplers`, `driver` and `guidance`, in that order.
"""
