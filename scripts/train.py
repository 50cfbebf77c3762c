"""Train from nothing, from a config file.

accelerate launch scripts/train.py --config configs/bundled-autoencoder.yaml [--set loop.pictures=1000 ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
