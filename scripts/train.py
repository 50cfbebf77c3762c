"""Train one stage from a config file. To resume, run the same command again.

accelerate launch scripts/train.py --config configs/bundled-autoencoder.yaml [--set loop.pictures=1000 ...]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.errors import UserError
from ldm.training.run import train


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="override values of the config"
    )
    arguments = parser.parse_args()
    try:
        return 0 if train(arguments.config, arguments.set) else 3
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
