"""What computes a system's networks beside torch: libraries that one may have or not."""

from typing import Literal

Backend = Literal["torch", "openvino", "cuda_graphs"]
