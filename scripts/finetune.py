"""Fine-tune a model, from a config file: whole, LoRA, DreamBooth, textual inversion, inpainting.

accelerate launch -q scripts/finetune.py --config configs/lora.yaml [--set text_to_image.data.path=my-pictures ...]

Without -q, accelerate puts a stack trace of its own below every message. python scripts/finetune.py works too.
Several processes: see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout without installing

from ldm.training.cli import main

if __name__ == "__main__":
    sys.exit(main(kinds=["ldm.emoji.pools"]))
