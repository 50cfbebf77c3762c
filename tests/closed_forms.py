"""Data whose exact denoiser is known in closed form: what samplers and likelihoods are measured against."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal


@dataclass(frozen=True)
class Mixture:
    """Gaussians in d dimensions, shape (B, d, 1, 1): weights (K,), means (K, d), covariances (K, d, d), float64."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def of(cls, weights: list[float], means: list[list[float]], stds: list[float]) -> "Mixture":
        """Round ones, by their standard deviations."""
        eye = torch.eye(len(means[0]), dtype=torch.float64)
        spread = torch.stack([eye * std**2 for std in stds])
        return cls(torch.tensor(weights).double(), torch.tensor(means).double(), spread)

    @classmethod
    def gaussian(cls, mean: Tensor, covariance: Tensor) -> "Mixture":
        return cls(torch.ones(1).double(), mean.double()[None], covariance.double()[None])

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        apart = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + apart.T @ (
            self.weights[:, None] * apart
        )

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean of x0 (Tweedie), at noise levels (B,) that are all one; in float64."""
        points, level = x.flatten(1).double(), sigma[0].double()
        gains, logs = [], []
        for weight, mean, covariance in zip(self.weights, self.means, self.covariances, strict=True):
            noisy = covariance + level**2 * torch.eye(len(mean), dtype=torch.float64)
            apart = points - mean
            solved = torch.linalg.solve(noisy, apart.T).T
            gains.append(mean + solved @ covariance)
            logs.append(weight.log() - (apart * solved).sum(1) / 2 - torch.logdet(noisy) / 2)
        share = torch.stack(logs).softmax(0)[..., None]
        return (share * torch.stack(gains)).sum(0).to(x.dtype).view_as(x)

    def log_p(self, x: Tensor, sigma: float) -> Tensor:
        """The log density, nats, of x (B, d, 1, 1) under noise of level sigma."""
        points, eye = x.flatten(1).double(), torch.eye(len(self.means[0]), dtype=torch.float64)
        parts = [
            weight.log() + MultivariateNormal(mean, covariance + sigma**2 * eye).log_prob(points)
            for weight, mean, covariance in zip(self.weights, self.means, self.covariances, strict=True)
        ]
        return torch.stack(parts).logsumexp(0)

    def draw(self, count: int, sigma: float = 0.0) -> Tensor:
        """Samples (count, d, 1, 1), float64, under noise of level sigma."""
        which = torch.multinomial(self.weights, count, replacement=True)
        roots = torch.linalg.cholesky(self.covariances)[which]
        noise = torch.randn(count, len(self.means[0]), 1, dtype=torch.float64)
        x = self.means[which] + (roots @ noise)[..., 0]
        return (x + sigma * torch.randn_like(x))[..., None, None]


def assert_moments(x: Tensor, data: Mixture, sigma: float = 0.0, bias: float = 0.0) -> None:
    """Samples x (B, d, 1, 1) have the mean and covariance of the data under noise sigma.

    Within five standard errors, by the samples' own spread (one of d^2 numbers beyond is one in 10^5), and `bias`, a
    share of the standard deviations that the caller derives from step sizes.
    """
    points = x.flatten(1).double()
    covariance = data.covariance + sigma**2 * torch.eye(points.shape[1], dtype=torch.float64)
    std = covariance.diagonal().sqrt()
    apart = points - data.mean
    error = 5 * std / math.sqrt(len(points)) + bias * std
    assert (apart.mean(0).abs() < error).all(), (apart.mean(0), error)
    products = apart[:, :, None] * apart[:, None, :]
    error = 5 * products.std(0) / math.sqrt(len(points)) + bias * std[:, None] * std
    assert ((products.mean(0) - covariance).abs() < error).all(), (products.mean(0) - covariance, error)


TWO = Mixture.of([0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], [0.25, 0.35])
