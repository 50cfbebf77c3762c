"""Train what a config file says: from nothing, or fine-tune (whole, LoRA, DreamBooth, textual inversion, inpainting).

accelerate launch -q scripts/train.py --config configs/bundled-autoencoder.yaml [--set loop.pictures=1000 ...]

Without -q, accelerate puts a stack trace of its own below every message. python scripts/train.py works too.
Several processes: see --help. scripts/finetune.py is another name of this.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.training.cli import main

if __name__ == "__main__":
    sys.exit(main(kinds=["ldm.emoji.pools"]))
