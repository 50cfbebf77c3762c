"""What `ldm.evaluation.likelihood` measured, as a table, as figures in JSON, and as a plot of the terms."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.diffusion.bound import LN2
from ldm.diffusion.ode import check
from ldm.errors import UserError
from ldm.evaluation.exact import Exact, measure_exact
from ldm.evaluation.likelihood import PIXEL_LEVEL, Estimate, FirstStage, Likelihood, Settings, measure
from ldm.evaluation.subjects import Pictures, Subject
from ldm.figures import figure
from ldm.files import whole_file, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_FLOOR = 1e-7  # bits, below which a term is not worth a plot's height


def evaluate(
    subject: Subject,
    pictures: Pictures,
    output: Path,
    settings: Settings,
    ode: int = 0,
    tolerance: float = 1e-4,
) -> str:
    """Measure a model over pictures; return the table. See `measure`.

    output: a folder that gets bound.md, bound.json and bound.png. ode: of so many pictures the exact likelihood too.
    Raises UserError.
    """
    figure(1, 1)  # whoever can't plot is told so before the work
    if ode < 0:
        raise UserError(f"of {ode} pictures there is no likelihood by the ODE: give 0 or more")
    if ode:
        check(tolerance)
    found = measure(subject, pictures, settings)
    text, numbers = table(found), figures(found)
    if ode:
        exact = measure_exact(subject, pictures, settings, found, ode, 2, tolerance)
        text += "\n\n" + exact_table(exact)
        numbers["exact"] = {name: getattr(exact, name).tolist() for name in ("ode", "probes", "bound")}
    write_text(output / "bound.md", text + "\n")
    write_text(output / "bound.json", json.dumps(numbers, indent=1) + "\n")
    with whole_file(output / "bound.png") as temporary:
        plot(found).savefig(temporary, dpi=110, format="png")
    return text


def exact_table(found: Exact) -> str:
    """Return the exact figures beside the bound's, in Markdown."""
    what = f"-log p at the least noise level, {len(found.ode)} pictures"
    lines = [f"| {what} | nats an element | bits an element | error, bits |", "|---|---|---|---|"]
    names = {
        "by the probability-flow ODE": found.ode,
        "the bound": found.bound,
        "the bound above the ODE, picture by picture": found.over,
    }
    for name, values in names.items():
        value = Estimate.of(values[:, None])
        lines.append(
            f"| {name} | {_number(value.mean)} | {_number(value.mean, 1 / LN2)} | {_number(value.error, 1 / LN2)} |"
        )
    lines.append(
        f"\nThe bound is below the exact value in {int((found.over < 0).sum())} of {len(found.over)} pictures; the "
        f"probes' error is {_number(found.probes.mean().item(), 1 / LN2)} bits an element; {found.evaluations} network "
        "calls."
    )
    return "\n".join(lines)


def estimates(found: Likelihood) -> dict[str, Estimate]:
    """Return the terms of the bound by name, in nats an element of what is denoised; "total" is the bound itself."""
    bound = found.bound
    rows = {"L_T": bound.prior, "steps": bound.steps, "L_0": bound.decoder, "total": bound.total}
    rows["noised"] = bound.noised(found.chain.sigma_min)
    return {name: Estimate.of(found.pictures(values)) for name, values in rows.items()}


def table(found: Likelihood) -> str:
    """Return the figures as tables in Markdown, with what they are of above them."""
    settings, count = found.settings, len(found.pictures(found.bound.prior))
    some = found.bound.terms.shape[1]
    part = f", {some} of the terms each" if some < found.chain.num_train_timesteps else ""
    what = "latent" if found.first_stage else "pixel"
    lines = [
        f"{count} pictures, {found.elements:,} {what} elements each; {found.chain.num_train_timesteps} steps, variance "
        f"{found.variance}; {settings.draws} draw(s) of noise a picture{part}.",
        "",
        f"| term of the bound | nats a {what} element | bits a {what} element | error, bits | of it noise, bits |",
        "|---|---|---|---|---|",
    ]
    names = {
        "L_T": "L_T, the prior's",
        "steps": f"L_1 to L_{found.chain.num_train_timesteps - 1}, the steps'",
        "L_0": "L_0, the decoder's",
        "total": "the bound",
        "noised": "the bound on the density at the least noise level, without L_0",
    }
    for name, value in estimates(found).items():
        errors = " | ".join(_number(each, 1 / LN2) for each in (value.error, value.noise))
        lines.append(f"| {names[name]} | {_number(value.mean)} | {_number(value.mean, 1 / LN2)} | {errors} |")
    if found.first_stage is not None:
        lines += ["", *_first_stage_lines(found, found.first_stage)]
    return "\n".join(lines)


def first_stage_estimates(found: Likelihood, stage: FirstStage) -> dict[str, Estimate]:
    """Return the first stage's figures by name, in nats a picture, densities of pixels in [-1, 1].

    whole: the first stage under the U-Net's bound in place of N(0, I); only there where the bound's latents were drawn
    from the posterior.
    """
    rows = {"reconstruction": stage.reconstruction, "kl": stage.kl, "elbo": stage.reconstruction + stage.kl}
    found_rows = {name: Estimate.of(values[:, None]) for name, values in rows.items()}
    if found.settings.sample_posterior:
        latents = found.pictures(found.bound.total) * found.elements
        whole = (stage.reconstruction - stage.entropy)[:, None] + latents
        found_rows["whole"] = Estimate.of(whole)
    return found_rows


def _first_stage_lines(found: Likelihood, stage: FirstStage) -> list[str]:
    kind = "Gaussian of deviation" if stage.observation == "gaussian" else "Laplace of scale"
    fitted = "given" if stage.given else "the likeliest here"
    names = {
        "reconstruction": f"-log p(pixels given latent), {kind} {stage.scale:.4g} ({fitted})",
        "kl": "KL(posterior from N(0, I))",
        "elbo": "the first stage's bound (negative ELBO)",
        "whole": "the whole: with the U-Net's bound in place of N(0, I)",
    }
    lines = [
        "| the first stage | nats a picture | nats a pixel element | bits a pixel element at 8 bits | error, bits |",
        "|---|---|---|---|---|",
    ]
    for name, value in first_stage_estimates(found, stage).items():
        each, at_8_bits = value.mean / stage.elements, ""
        if name != "kl":  # a density of pixels: as the probability of one of 256 levels
            at_8_bits = f"{(each + PIXEL_LEVEL) / LN2:.4f}"
        error = _number(value.error, 1 / stage.elements / LN2)
        lines.append(f"| {names[name]} | {value.mean:,.1f} | {each:.4f} | {at_8_bits} | {error} |")
    return lines


def _number(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.4g}" if abs(value) < 1e-3 else f"{value * scale:.4f}"


def figures(found: Likelihood) -> dict[str, Any]:
    """Return all figures for a JSON file: nats an element, and nats a picture of the first stage."""
    names = ("timesteps", "terms", "x0_mse", "eps_mse")
    means = {name: getattr(found.bound, name).double().mean(0).tolist() for name in names}
    stage = found.first_stage
    first = {} if stage is None else {k: vars(v) for k, v in first_stage_estimates(found, stage).items()}
    return {
        "settings": vars(found.settings),
        "variance": found.variance,
        "steps": found.chain.num_train_timesteps,
        "elements": found.elements,
        "bound": {name: vars(value) for name, value in estimates(found).items()},
        "first_stage": first | ({} if stage is None else {"scale": stage.scale}),
        "by_timestep": means,  # where terms were drawn from ranges of timesteps, of each range
    }


def plot(found: Likelihood) -> "Figure":
    """Draw the terms against the timestep, and the network's squared errors, on logarithmic scales.

    Raises UserError where matplotlib isn't installed.
    """
    drawn = figure(11, 4.2)
    left, right = drawn.subplots(1, 2)
    what = "latent" if found.first_stage else "pixel"
    # Where terms were drawn from ranges of timesteps, each range is one point.
    timesteps, terms = found.bound.timesteps.double().mean(0), found.bound.terms / LN2
    low, high = (terms.quantile(share, dim=0).clamp(min=_FLOOR)[1:] for share in (0.25, 0.75))
    left.fill_between(timesteps[1:], low, high, alpha=0.3, linewidth=0, label="half of the pictures")
    left.plot(timesteps[1:], terms.mean(0)[1:], label=f"mean ({found.variance})")
    total, decoder, prior = (estimates(found)[name].mean / LN2 for name in ("total", "L_0", "L_T"))
    left.set(xscale="log", yscale="log", xlabel="timestep", ylabel=f"term, bits a {what} element")
    left.set_ylim(bottom=_FLOOR)
    left.set_title(f"bound {total:.3f} = L_T {prior:.2g} + steps + L_0 {decoder:.3f} bits", fontsize=10)
    for name, values in (("of x0", found.bound.x0_mse), ("of the noise", found.bound.eps_mse)):
        right.plot(timesteps, values.mean(0), label=name)
    right.set(yscale="log", xlabel="timestep", ylabel="mean squared error")
    right.set_ylim(bottom=1e-5)
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    return drawn
