"""Samplers as coroutines: each solves the reverse process from `sigmas[0]` down to `sigmas[-1]`.

A sampler is a generator function of (x, sigmas, noise) and options of its own. It yields `(x, sigma)`
whenever it wants a prediction, receives the estimate of x0, and returns the last x. State: x of shape
(B, C, h, w) = x0 + sigma * noise. sigmas: n + 1 floats, descending; the last is 0 or a small remainder.
`noise()` gives fresh standard normal noise shaped like x. span: the steps to take, such as range(5, n) for
the last n - 5, which begin at sigmas[5]; None takes all. What depends on a step's number counts from the
whole all the same, as diffusers does. History lives in local variables: nothing is stored between runs, and
many runs may stand side by side. `driver.sample` runs one.

With h = log(sigma / sigma_next), the step in log-SNR, "DPM-Solver++" (Lu et al. 2022, arXiv:2211.01095)
moves x towards an estimate d of x0 by exactly the line of `straight_step`; the methods differ in d alone.
"""

import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldm.diffusion import parameterization
from ldm.diffusion.parameterization import per_image

Variance = Literal["fixed_small", "fixed_large", "learned_range"]
Steps = Generator[tuple[Tensor, float], Tensor, Tensor]
NoiseSource = Callable[[], Tensor]


def walk(sigmas: Sequence[float], span: range | None) -> Iterator[tuple[int, float, float]]:
    """Yield the steps of a span: the number of each in the whole, and the noise levels that it goes from and to."""
    for i in _whole(sigmas) if span is None else span:
        yield i, sigmas[i], sigmas[i + 1]


def _whole(sigmas: Sequence[float]) -> range:
    return range(len(sigmas) - 1)


def straight_step(x: Tensor, x0: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """Go from sigma to sigma_next, one for all images or one each, (B,), on the straight line from x to x0: DDIM."""
    ratio = sigma_next / sigma
    return x0 + (x - x0) * (per_image(ratio, x) if isinstance(ratio, Tensor) else ratio)


def _split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up): step down to `down`, then add noise of std `up` to stand at sigma_next.

    eta 0 adds nothing; eta 1 adds the variance of the posterior q(x_next | x, x0) (Song et al. 2020, eq. 16).
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0)))
    return math.sqrt(sigma_next**2 - up**2), up


def _extrapolate(x0: Tensor, previous: Tensor, h: float, h_previous: float) -> Tensor:
    """x0 in the middle of the coming step, on the line through the last two estimates."""
    return x0 + (x0 - previous) * (h / (2 * h_previous))


def euler(x: Tensor, sigmas: Sequence[float], noise: NoiseSource, span: range | None = None) -> Steps:
    """Sample by Euler's method (Karras et al. 2022, algorithm 1 without the second order); DDIM with eta 0."""
    for _, sigma, sigma_next in walk(sigmas, span):
        x0 = yield x, sigma
        x = straight_step(x, x0, sigma, sigma_next)
    return x


def euler_ancestral(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    eta: float = 1.0,
    stops: Sequence[float] | None = None,
    clip: Callable[[Tensor], Tensor] | None = None,
) -> Steps:
    """Sample by Euler's method with fresh noise at each step: DDIM(eta) written in sigma, Song et al. 2020, eq. 12.

    clip: applied to the estimate of x0 but not to the noise estimated with it, as DDIM does.
    stops: where each step ends, if beside the next sigma: diffusers' DDIM steps back a constant T // n
    timesteps, which misses the next one where n does not divide T, and goes on as if it had not.
    """
    for i, sigma, sigma_next in walk(sigmas, span):
        x0 = yield x, sigma
        stop = stops[i] if stops else sigma_next
        down, up = _split(sigma, stop, eta)
        x = (clip(x0) if clip else x0) + (x - x0) * (down / sigma)
        if up > 0:
            x = x + noise() * up
        if stop != sigma_next:
            x = x * math.sqrt((1 + sigma_next**2) / (1 + stop**2))
    return x


def ddim(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    eta: float = 0.0,
    stops: Sequence[float] | None = None,
    clip: Callable[[Tensor], Tensor] | None = None,
) -> Steps:
    """Sample by DDIM (Song et al. 2020): `euler_ancestral`, without noise unless eta says otherwise.

    The noise is eta times the paper's own (eq. 16), also of a network that learned its variance: no paper puts that
    into DDIM, and guided-diffusion leaves it out too.
    """
    return euler_ancestral(x, sigmas, noise, span, eta, stops, clip)


def ddpm(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    variance: Variance = "fixed_small",
) -> Steps:
    """Sample ancestrally (Ho et al. 2020, algorithm 2): the mean of the posterior q(x_next | x, x0), and noise.

    variance: of the noise. "fixed_small" is the posterior's, beta-tilde; "fixed_large" the forward step's, beta (Ho et
    al. 2020, section 3.2); "learned_range" lies between the two in their logarithms, where the estimate says so, which
    then has 2C channels: x0 and a share in [-1, 1] (Nichol & Dhariwal 2021, eq. 15). Where steps are left out, beta is
    that of the whole way from sigma_next to sigma, as in guided-diffusion's respacing.
    """
    channels = x.shape[1]
    for _, sigma, sigma_next in walk(sigmas, span):
        estimate = yield x, sigma
        x0, share = estimate[:, :channels], estimate[:, channels:]
        x = x0 + (x - x0) * (sigma_next / sigma) ** 2
        if sigma_next > 0:
            x = x + noise() * ancestral_deviation(sigma, sigma_next, variance, share)
    return x


def ancestral_deviation(
    sigma: float | Tensor, sigma_next: float | Tensor, variance: Variance, share: Tensor
) -> float | Tensor:
    """Return the standard deviation of the noise of `ddpm`'s step from sigma to sigma_next > 0.

    share: (B, C, h, w), where the variance is learned; without a say else.
    """
    small = sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
    if variance == "fixed_small":
        return small
    ratio = ((1 + sigma_next**-2) / (1 + sigma**-2)) ** 0.5  # of the large deviation to the small one
    return small * (ratio if variance == "fixed_large" else ratio ** ((share + 1) / 2))


def heun(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    long_steps: bool = False,
) -> Steps:
    """Sample by Heun's method (Karras et al. 2022, algorithm 1): two predictions a step, one for the last.

    It averages the slopes of x in sigma, which moves a step's end by (sigma / sigma_next - 1) / 2 of the change of x0
    on the way: beyond the new x0 where sigma more than halves. long_steps: average those steps' slopes of x / sigma in
    1 / sigma, the two estimates of x0, where that share is never more than a half; exact for an x0 that is a line in
    1 / sigma, as it is where x is nearly noise.
    """
    for _, sigma, sigma_next in walk(sigmas, span):
        x0 = yield x, sigma
        trial = straight_step(x, x0, sigma, sigma_next)
        if sigma_next > 0:
            slope = (x - x0) / sigma
            x0_next = yield trial, sigma_next
            if long_steps and sigma > 2 * sigma_next:
                trial = straight_step(x, (x0 + x0_next) / 2, sigma, sigma_next)
            else:
                trial = x + (slope + (trial - x0_next) / sigma_next) * ((sigma_next - sigma) / 2)
        x = trial
    return x


def lms(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    order: int = 4,
) -> Steps:
    """Sample by linear multistep (Adams-Bashforth on uneven steps) in sigma, order 1 to 4."""
    slopes: list[Tensor] = []
    for i, sigma, sigma_next in walk(sigmas, span):
        x0 = yield x, sigma
        slopes = [(x - x0) / sigma, *slopes[: order - 1]]
        nodes = [sigmas[i - k] for k in range(len(slopes))]
        weights = _integrate_lagrange(nodes, sigma, sigma_next)
        x = x + sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return x


def _integrate_lagrange(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integral from start to end of each Lagrange polynomial; Gauss's two points are exact to degree 3."""

    def basis(k: int, at: float) -> float:
        return math.prod((at - other) / (nodes[k] - other) for m, other in enumerate(nodes) if m != k)

    half, middle = (end - start) / 2, (start + end) / 2
    offset = half / math.sqrt(3)
    return [half * (basis(k, middle - offset) + basis(k, middle + offset)) for k in range(len(nodes))]


def dpmpp_2m(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    eta: float = 0.0,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Steps:
    """Sample by DPM-Solver++(2M), midpoint; with eta 1 its SDE form.

    The last step is of first order if it ends at 0, if `euler_at_final`, or if there are fewer than 15
    steps and `lower_order_final` (diffusers' rules).
    """
    steps = len(sigmas) - 1
    euler_last = sigmas[-1] == 0 or euler_at_final or (lower_order_final and steps < 15)
    previous: Tensor | None = None
    for i, sigma, sigma_next in walk(sigmas, span):
        x0 = yield x, sigma
        d = x0
        if previous is not None and not (euler_last and i == steps - 1):
            d = _extrapolate(x0, previous, math.log(sigma / sigma_next), math.log(sigmas[i - 1] / sigma))
        ratio = sigma_next / sigma
        x = d + (x - d) * ratio ** (1 + eta)
        if eta > 0:
            x = x + noise() * (sigma_next * math.sqrt(1 - ratio ** (2 * eta)))
        previous = x0
    return x


def dpmpp_2m_sde(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    eta: float = 1.0,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Steps:
    """Sample by SDE-DPM-Solver++(2M): `dpmpp_2m` with noise."""
    return dpmpp_2m(x, sigmas, noise, span, eta, lower_order_final, euler_at_final)


def dpmpp_2s(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    lower_order_final: bool = True,
) -> Steps:
    """Sample by DPM-Solver++(2S): steps over two sigmas at a time, with a prediction at the one between.

    With `lower_order_final`, or where it ends at 0, the last step is of first order.
    """
    last, chosen = len(sigmas) - 1, _whole(sigmas) if span is None else span
    lower_order_final = lower_order_final or sigmas[-1] == 0
    i = chosen.start
    while i < chosen.stop:
        x0 = yield x, sigmas[i]
        between = straight_step(x, x0, sigmas[i], sigmas[i + 1])
        # Pairs are those of the whole: a run that begins or ends inside one takes half of it, in first order.
        if i % 2 or i + 1 == chosen.stop or (i + 2 == last and lower_order_final):
            x, i = between, i + 1
            continue
        x0_between = yield between, sigmas[i + 1]
        h, h_between = math.log(sigmas[i] / sigmas[i + 2]), math.log(sigmas[i] / sigmas[i + 1])
        d = x0 + (x0_between - x0) * (h / (2 * h_between))
        x, i = straight_step(x, d, sigmas[i], sigmas[i + 2]), i + 2
    return x


def dpmpp_sde(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    eta: float = 1.0,
) -> Steps:
    """Sample by DPM-Solver++ SDE, singlestep of second order with r = 1/2 (k-diffusion's sample_dpmpp_sde).

    The noise of the half step is part of the noise of the whole one: both lie on one Brownian path,
    which runs in sigma as diffusers' does.
    """
    for _, sigma, sigma_next in walk(sigmas, span):
        x0 = yield x, sigma
        if sigma_next == 0:
            return x0
        middle = math.sqrt(sigma * sigma_next)
        down, up = _split(sigma, middle, eta)
        z = noise()
        x0 = yield straight_step(x, x0, sigma, down) + z * up, middle
        down, up = _split(sigma, sigma_next, eta)
        share = (sigma - middle) / (sigma - sigma_next)
        z = z * math.sqrt(share) + noise() * math.sqrt(1 - share)
        x = straight_step(x, x0, sigma, down) + z * up
    return x


def unipc(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    lower_order_final: bool = True,
) -> Steps:
    """Sample by UniPC of order 2 with B(h) = exp(h) - 1 (Zhao et al. 2023, arXiv:2302.04867; "bh2").

    Each prediction serves twice: it corrects the step that led to it (UniC), then takes the next (UniP,
    which is DPM-Solver++(2M)).
    """
    last = len(sigmas) - 2
    start, history = x, list[Tensor]()  # the state that the current step began from; estimates, newest first
    for i, sigma, sigma_next in walk(sigmas, span):
        x0 = yield x, sigma
        if history:
            x = straight_step(
                start, _unic(x0, history, sigmas[i - len(history) : i + 1]), sigmas[i - 1], sigma
            )
        history = [x0, *history[:1]]
        start, d = x, x0
        if len(history) > 1 and sigma_next > 0 and not (i == last and lower_order_final):
            d = _extrapolate(*history, math.log(sigma / sigma_next), math.log(sigmas[i - 1] / sigma))
        x = straight_step(x, d, sigma, sigma_next)
    return x


def _unic(x0: Tensor, history: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """The corrector's d, from the estimate at the step's end and those at its start (and before it)."""
    h = math.log(sigmas[-2] / sigmas[-1])
    if len(history) == 1:
        return (history[0] + x0) / 2
    r = -math.log(sigmas[-3] / sigmas[-2]) / h
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    before = (phi_2 - 2 * phi_3) / (phi_1 * (1 - r))
    ahead = phi_2 / phi_1 - before
    return history[0] + (history[1] - history[0]) * (before / r) + (x0 - history[0]) * ahead


def pndm(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    prediction_type: str = "epsilon",
    midpoints: Sequence[float] = (),
    uneven: Collection[int] = (),
) -> Steps:
    """Sample by PNDM (Liu et al. 2022, arXiv:2202.09778): linear multistep on the network's output, DDIM as transfer.

    midpoints: a sigma inside each of the first steps, which Runge-Kutta (PRK) then takes; without them
    the first step is a two-stage one (PLMS, as Stable Diffusion is sampled).
    uneven: the steps that are of quite another length, in timesteps, than the one before. The multistep weights are
    those of even steps: there it begins anew.
    """

    def output(x0: Tensor, x: Tensor, sigma: float) -> Tensor:
        return parameterization.target(prediction_type, x0, x, x.new_full((1,), sigma))

    def move(x: Tensor, sigma: float, sigma_next: float, *outputs: Tensor) -> Tensor:
        weights = _PNDM_WEIGHTS[len(outputs)]
        mean = sum(weight * each for weight, each in zip(weights, outputs, strict=True))
        assert isinstance(mean, Tensor)
        x0 = parameterization.x0_from(prediction_type, mean, x, x.new_full((1,), sigma))
        return straight_step(x, x0, sigma, sigma_next)

    history: list[Tensor] = []
    for i, sigma, sigma_next in walk(sigmas, span):
        first_of_all = not history
        history = [output((yield x, sigma), x, sigma), *([] if i in uneven else history[:3])]
        if i < len(midpoints):
            first, middle = history[0], midpoints[i]
            trial = move(x, sigma, middle, first)
            second = output((yield trial, middle), trial, middle)
            trial = move(x, sigma, middle, second)
            third = output((yield trial, middle), trial, middle)
            trial = move(x, sigma, sigma_next, third)
            fourth = output((yield trial, sigma_next), trial, sigma_next)
            x = move(x, sigma, sigma_next, (first + 2 * second + 2 * third + fourth) / 6)
            continue
        trial = move(x, sigma, sigma_next, *history)
        if first_of_all and len(sigmas) > 2:
            second = output((yield trial, sigma_next), trial, sigma_next)
            trial = move(x, sigma, sigma_next, (history[0] + second) / 2)
        x = trial
    return x


# Adams-Bashforth, newest first.
_PNDM_WEIGHTS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def lcm(
    x: Tensor,
    sigmas: Sequence[float],
    noise: NoiseSource,
    span: range | None = None,
    floor: float = 0.0,
    s_noise: float = 1.0,
    clip: Callable[[Tensor], Tensor] | None = None,
) -> Steps:
    """Sample by multistep consistency sampling: to x0 and back up, each step (Luo et al. 2023, arXiv:2310.04378).

    floor: the noise level at which a consistency function ends, which then stays in x0 (Song et al. 2023, algorithm 1:
    epsilon). s_noise: scale of the noise. clip: applied to the estimates of x0.
    """
    for _, sigma, sigma_next in walk(sigmas, span):
        x = yield x, sigma
        x = clip(x) if clip else x
        if sigma_next > floor:
            x = x + noise() * (s_noise * math.sqrt(sigma_next**2 - floor**2))
    return x


@dataclass(frozen=True)
class Sampler:
    """A sampler by name: its coroutine, and its class in diffusers."""

    solve: Callable[..., Steps]
    scheduler: str


SAMPLERS = {
    "euler": Sampler(euler, "EulerDiscreteScheduler"),
    "euler_ancestral": Sampler(euler_ancestral, "EulerAncestralDiscreteScheduler"),
    "ddim": Sampler(ddim, "DDIMScheduler"),
    "ddpm": Sampler(ddpm, "DDPMScheduler"),
    "heun": Sampler(heun, "HeunDiscreteScheduler"),
    "lms": Sampler(lms, "LMSDiscreteScheduler"),
    "dpmpp_2m": Sampler(dpmpp_2m, "DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, "DPMSolverMultistepScheduler"),
    "dpmpp_sde": Sampler(dpmpp_sde, "DPMSolverSDEScheduler"),
    "dpmpp_2s": Sampler(dpmpp_2s, "DPMSolverSinglestepScheduler"),
    "unipc": Sampler(unipc, "UniPCMultistepScheduler"),
    "pndm": Sampler(pndm, "PNDMScheduler"),
    "lcm": Sampler(lcm, "LCMScheduler"),
}
