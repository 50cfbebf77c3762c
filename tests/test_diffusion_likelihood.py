"""The probability-flow ODE and exact likelihoods, against closed forms; and on a network with frozen weights."""

import math
from itertools import pairwise

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.driver import sample
from ldm.diffusion.likelihood import BITS_OF_8_BIT_PICTURES, decode, encode, log_likelihood
from ldm.diffusion.ode import flow
from ldm.diffusion.samplers import heun
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.sde import VP, SubVP
from ldm.diffusion.variance_exploding import VE
from ldm.errors import UserError
from ldm.models.packed import Conv2d
from tests.closed_forms import TWO, Mixture, assert_moments

SDES = {
    "vp": VP(),
    "subvp": SubVP(),
    "ve": VE(0.01, 50.0),
    "table": VP.of(NoiseSchedule.build("linear", 0.0001, 0.02)),
}
MIXED = torch.randn(8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 3
# Around 0, as the priors are: a mean m changes a row's log likelihood by about m / sigma_max times its noise there.
WIDE = Mixture.gaussian(torch.zeros(8), MIXED @ MIXED.T + 0.05 * torch.eye(8))  # not along the axes
CENTRED = Mixture(TWO.weights, TWO.means - TWO.mean, TWO.covariances)


def from_prior(data, sde, x):
    """What the model's log likelihood is: the density of the ODE's way from the prior, not from the data's own noise.

    For Gaussian data the ODE is linear: x at sigma_max is m + R (x - m) with R^2 = (C + max^2) (C + min^2)^-1.
    """
    mean, covariance = data.means[0], data.covariances[0]
    values, vectors = torch.linalg.eigh(covariance)
    stretch = ((values + sde.sigma_max**2) / (values + sde.sigma_min**2)).sqrt()
    noise = mean + (x.flatten(1) - mean) @ (vectors * stretch) @ vectors.T
    return sde.log_prior(noise[..., None, None]) + stretch.log().sum()


@pytest.mark.parametrize("name", SDES)
def test_likelihood_of_a_gaussian(name):
    """Within 1e-3 nats a dimension of the closed form: of the model with its prior, and of the data itself."""
    sde, x = SDES[name], WIDE.draw(16)
    found = log_likelihood(WIDE.denoise, x, sde, exact=True)
    assert found.dims == 8 and (found.error == 0).all()
    assert ((found.log_p - from_prior(WIDE, sde, x)) / 8).abs().max() < 1e-3
    # The prior is not quite the noisy data's: of its variances one in sigma_max^2, below 1/2500, is the data's.
    assert ((found.log_p - WIDE.log_p(x, sde.sigma_min)) / 8).abs().max() < 1e-3
    bits = -found.log_p / 8 / math.log(2) + 7
    torch.testing.assert_close(found.bits_per_dim(BITS_OF_8_BIT_PICTURES), bits)


@pytest.mark.parametrize("name", SDES)
def test_likelihood_of_a_mixture(name):
    """Beyond Gaussians, within 1e-3 nats a dimension."""
    sde, x = SDES[name], CENTRED.draw(32)
    found = log_likelihood(CENTRED.denoise, x, sde, exact=True)
    assert ((found.log_p - CENTRED.log_p(x, sde.sigma_min)) / 2).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinsons_error_bar_is_honest(kind):
    """Over 100 seeds: as often within two standard errors as Student's t says, which are as large as the spread."""
    sde, x, probes, seeds = SDES["vp"], WIDE.draw(1), 12, 100
    many = x.expand(seeds, -1, -1, -1)  # each row has probes of its own: 100 seeds in one batch
    exact = from_prior(WIDE, sde, x).item()
    found = log_likelihood(
        WIDE.denoise, many, sde, probes=probes, kind=kind, generator=torch.Generator().manual_seed(1)
    )
    apart = found.log_p - exact
    from scipy.stats import t

    share = 1 - 2 * t.sf(2, probes - 1)  # 0.93
    inside = (apart.abs() < 2 * found.error).double().mean().item()
    print(f"{kind}: {inside:.2f} inside two bars of {found.error.mean():.2f} nats, of {share:.2f} expected")
    # three binomial standard deviations, and the skewness of sums of a dozen squares
    assert abs(inside - share) < 3 * math.sqrt(share * (1 - share) / seeds)
    assert apart.std() == pytest.approx(
        found.error.square().mean().sqrt().item(), rel=4 / math.sqrt(2 * seeds)
    )
    assert abs(apart.mean()) < 4 * apart.std() / math.sqrt(seeds)


def test_rows_with_generators_of_their_own_have_the_same_probes_in_any_batch():
    def found(x, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return log_likelihood(
            WIDE.denoise, x, SDES["vp"], probes=2, generator=generators, rtol=1e-6, atol=1e-6
        )

    x = WIDE.draw(3)
    whole = found(x, range(3))
    for k in range(3):
        alone = found(x[k : k + 1], [k])
        torch.testing.assert_close(alone.log_p, whole.log_p[k : k + 1], rtol=0, atol=1e-3)
    # and each has others: the same point three times has as many figures
    same = found(x[:1].expand(3, -1, -1, -1), range(3)).log_p
    assert (same[:, None] - same)[~torch.eye(3, dtype=torch.bool)].abs().min() > 0.1


def test_one_probe_has_no_error_bar():
    assert log_likelihood(WIDE.denoise, WIDE.draw(2), SDES["vp"]).error.isnan().all()


@pytest.mark.parametrize("name", SDES)
def test_encode_and_decode(name):
    """There and back within the solver's tolerance; the noise has the prior's moments, what is drawn the data's."""
    sde, x = SDES[name], TWO.draw(3000, SDES[name].sigma_min)
    noise = encode(TWO.denoise, x, sde)
    assert_moments(noise, TWO, sde.sigma_max, bias=1e-3)
    torch.testing.assert_close(decode(TWO.denoise, noise, sde), x, rtol=0, atol=2e-3)
    drawn = decode(TWO.denoise, TWO.draw(3000, sde.sigma_max), sde)
    assert_moments(drawn, TWO, sde.sigma_min, bias=1e-3)


def test_ode_is_the_papers():
    """Eq. 13 in the SDE's own state, dy = [f - g^2 score / 2] dt, by small steps of Heun's in t."""
    sde = SDES["subvp"]
    times = torch.linspace(0.8, 0.3, 400, dtype=torch.float64)
    levels = (sde.std(times) / sde.alpha(times)).tolist()
    x = torch.randn(3, 2, 1, 1, dtype=torch.float64) * levels[0]

    def slope(y, t):
        alpha, std = sde.alpha(t), sde.std(t)
        x0 = TWO.denoise(y / alpha, (std / alpha)[None])
        return sde.drift(y, t[None]) - sde.diffusion(t) ** 2 * (alpha * x0 - y) / std**2 / 2

    y = sde.alpha(times[0]) * x
    for t, t_next in pairwise(times):
        first = slope(y, t)
        y = y + (first + slope(y + first * (t_next - t), t_next)) * (t_next - t) / 2
    ours = flow(TWO.denoise, x, levels[0], levels[-1], rtol=1e-8, atol=1e-8).x
    torch.testing.assert_close(ours, y / sde.alpha(times[-1]), rtol=1e-4, atol=1e-4)
    stepped = sample(TWO.denoise, heun(x, levels, lambda: x))
    torch.testing.assert_close(ours, stepped, rtol=1e-3, atol=1e-3)


def test_solver_keeps_its_tolerance():
    """The error falls with the tolerance, for a little more work: order 5 of the paper's solver."""
    mean, covariance = WIDE.means[0], WIDE.covariances[0]
    values, vectors = torch.linalg.eigh(covariance)
    x, start, end = WIDE.draw(4, 20.0), 20.0, 0.05
    shrink = ((values + end**2) / (values + start**2)).sqrt()
    exact = (mean + (x.flatten(1) - mean) @ (vectors * shrink) @ vectors.T).view_as(x)
    errors, work = [], []
    for tolerance in (1e-6, 1e-8, 1e-10, 1e-12):
        found = flow(WIDE.denoise, x, start, end, rtol=tolerance, atol=tolerance)
        errors.append((found.x - exact).abs().max().item())
        work.append(found.evaluations)
    order = math.log(errors[2] / errors[3]) / math.log(work[3] / work[2])
    print("errors", errors, "evaluations", work, f"order {order:.1f}")
    assert all(
        error < 20 * tolerance for error, tolerance in zip(errors, (1e-6, 1e-8, 1e-10, 1e-12), strict=True)
    )
    assert 4.5 < order < 6.3


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Conv2d(2, 8, 3, padding=1), Conv2d(8, 2, 3, padding=1)

    def forward(self, x, timestep):
        return self.last(torch.nn.functional.silu(self.first(x)))


def test_a_frozen_network_with_packed_weights():
    """The trace through layers that have drawn, and so are packed, equals that of the same layers unpacked."""
    network, sde = Small(), SDES["table"]
    x = torch.randn(2, 2, 4, 4) / 2
    denoise = Denoiser(network, sde)
    free = log_likelihood(denoise, x, sde, exact=True)
    network.requires_grad_(False).eval()
    with torch.inference_mode():
        network(x, None)
        packed = log_likelihood(denoise, x, sde, exact=True)
    torch.testing.assert_close(packed.log_p, free.log_p, rtol=1e-4, atol=1e-3)
    probed = log_likelihood(denoise, x, sde, probes=64)
    assert ((probed.log_p - free.log_p).abs() < 4 * probed.error + 1e-3).all()


def test_bad_levels_get_a_line(monkeypatch):
    with pytest.raises(UserError, match="positive noise levels"):
        flow(TWO.denoise, TWO.draw(1), 0.0, 1.0)
    with pytest.raises(UserError, match="rademacher"):
        log_likelihood(TWO.denoise, TWO.draw(1), SDES["vp"], kind="ones")
    with pytest.raises(UserError, match="probes is 0"):
        log_likelihood(TWO.denoise, TWO.draw(1), SDES["vp"], probes=0)
    for wrong in (math.nan, 0.0, -1.0, 1.0):
        with pytest.raises(UserError, match="tolerance is"):
            flow(TWO.denoise, TWO.draw(1), 0.1, 1.0, atol=wrong)
    monkeypatch.setitem(__import__("sys").modules, "scipy.integrate", None)
    with pytest.raises(UserError, match="pip install scipy"):
        flow(TWO.denoise, TWO.draw(1), 0.1, 1.0)
