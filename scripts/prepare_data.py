"""Fetch and prepare what the bundled model is trained from (about 140 MB of packages), into runs/."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.errors import UserError
from ldm.training.prepare import prepare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", default="configs/bundled-unet.yaml", help="the run to prepare (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        prepare(arguments.config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
