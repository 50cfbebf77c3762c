"""Draw the rows of a file; installed as `ldm-batch` too. `--help` lists the options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from pipelines.batch.cli import main

if __name__ == "__main__":
    sys.exit(main())
