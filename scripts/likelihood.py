"""Measure how likely pictures are under a model: the variational bound term by term, and the first stage's own bound.

likelihood.py PICTURES [--model FOLDER] [--output FOLDER]
PICTURES: a folder with captions, webdataset shards or a saved dataset, as fine-tuning reads them; or the .yaml of a
training without text (`diffusion:`), for the pictures that it held out. The output folder gets bound.md, bound.json and
bound.png.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.console import Parser, command, note

_LARGEST = 16_384  # pixels of a side


@command()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--model", help="a folder, a single file or a hub id (default: the bundled model)")
    parser.add_argument("--output", type=Path, default=Path("runs/likelihood"))
    parser.add_argument("--variance", choices=("fixed_small", "fixed_large", "learned_range"))
    parser.add_argument("--steps", type=int, help="of the model's chain (default: all of its timesteps)")
    parser.add_argument("--evaluations", type=int, help="estimate the sum from so many terms (default: all)")
    parser.add_argument("--draws", type=int, default=1, help="of noise a picture (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=16, help="rows a network call takes (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=int, default=256, help="of a pixel; 0 for a density (default: 256)")
    parser.add_argument("--no-clip", action="store_true", help="take x0 of pixels as the network has it")
    parser.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    parser.add_argument("--no-captions", action="store_true", help="under the empty prompt")
    parser.add_argument(
        "--sample-posterior", action="store_true", help="draw latents from the first stage's posterior"
    )
    parser.add_argument("--observation", choices=("gaussian", "laplace"), default="gaussian")
    parser.add_argument("--scale", type=float, help="of the observation noise (default: the likeliest)")
    parser.add_argument("--ode", type=int, default=0, help="of so many pictures the exact likelihood too")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="of the ODE's solver (default: %(default)s)"
    )
    chosen = parser.parse_args()

    from ldm.data.pictures import open_pictures
    from ldm.errors import UserError
    from ldm.evaluation.likelihood import Settings
    from ldm.evaluation.likelihood_report import evaluate
    from ldm.evaluation.subjects import HeldOut, OnDisk, open_subject
    from ldm.training.objectives import diffusion
    from ldm.training.run import read_run

    settings = Settings(
        chosen.variance,
        chosen.steps,
        chosen.evaluations,
        chosen.draws,
        chosen.batch,
        chosen.seed,
        chosen.levels or None,
        not chosen.no_clip,
        chosen.sample_posterior,
        chosen.observation,
        chosen.scale,
    )
    settings.check()
    if chosen.resolution is not None and not 1 <= chosen.resolution <= _LARGEST:
        raise UserError(f"--resolution must be 1 to {_LARGEST:,}")
    subject = open_subject(chosen.model)
    if chosen.pictures.suffix == ".yaml":
        trained = read_run(chosen.pictures).settings
        if not isinstance(trained, diffusion.Config):
            raise UserError(f"{chosen.pictures} trains a model with text: give a folder of pictures")
        pictures = HeldOut(trained.data.examples("diffusion.data", trained.crop, trained.validation_pictures))
    else:
        found = open_pictures(chosen.pictures, caption_column="" if chosen.no_captions else "text")
        for each in found.report():
            note(each)
        pictures = OnDisk(found, chosen.resolution or subject.side)
    print(evaluate(subject, pictures, chosen.output, settings, chosen.ode, chosen.tolerance))
    return 0


if __name__ == "__main__":
    sys.exit(main())
