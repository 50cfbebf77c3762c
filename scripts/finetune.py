"""Fine-tune a model: `scripts/train.py` under the name that people look for; what is trained is the config's to say.

accelerate launch -q scripts/finetune.py --config configs/lora.yaml [--set text_to_image.data.path=my-pictures ...]
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")
