"""From a picture to a control picture, by libraries that are kept well. What one's own program draws works as well."""

from collections.abc import Callable

import numpy as np

from ldm.errors import UserError


def canny(picture: np.ndarray, low_threshold: float = 100, high_threshold: float = 200) -> np.ndarray:
    """Return a picture's edges, white on black, by OpenCV (Canny 1986).

    picture: uint8 (H, W, 3), RGB. low_threshold, high_threshold: of the gradient: an edge begins above the higher one
    and goes on above the lower one. Returns uint8 (H, W, 3). Raises UserError where OpenCV isn't installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError("edges are found by OpenCV: `pip install opencv-python-headless`") from error
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise UserError(f"edges are found in uint8 (H, W, 3), and this is {picture.dtype} {picture.shape}")
    edges = cv2.Canny(np.ascontiguousarray(picture), low_threshold, high_threshold)
    return np.stack([edges] * 3, -1)


PREPROCESSORS: dict[str, Callable[..., np.ndarray]] = {"canny": canny}
