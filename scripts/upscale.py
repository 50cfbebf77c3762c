"""Make pictures larger; installed as `ldm-upscale` too. `--help` lists the options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from pipelines.upscale_cli import main

if __name__ == "__main__":
    sys.exit(main())
