"""The six domains of the digits task: the same handwriting as six different scanners see it.

Each domain is a fixed map of 8x8 images. Rendered values are rounded to 1/64, so that the last
bits of an interpolation, which may differ between machines, do not tell two machines' data apart.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedgraft.seeds import stream

Images = NDArray[np.float64]
"""Images (n, 8, 8) with ink between 0 and 1."""


def _blurred(images: Images) -> Images:
    from scipy import ndimage

    noise = stream(0, "digits-noise").normal(size=images.shape)
    blurred: Images = ndimage.gaussian_filter(images, sigma=(0, 0.7, 0.7)) + 0.2 * noise
    return blurred


def _faint(images: Images) -> Images:
    return 0.3 + 0.4 * images


def _mirrored(images: Images) -> Images:
    return 0.1 + 0.8 * images[:, :, ::-1]


def _rotated(images: Images, degrees: float) -> Images:
    from scipy import ndimage

    turned: Images = ndimage.rotate(images, degrees, axes=(2, 1), reshape=False, order=1)
    return turned


def _shifted(images: Images) -> Images:
    moved = np.zeros_like(images)
    moved[:, 1:, 1:] = images[:, :-1, :-1]
    return moved


DOMAINS: dict[str, Callable[[Images], Images]] = {
    "blurred and noisy": _blurred,
    "low contrast": _faint,
    "mirrored": _mirrored,
    "rotated +45": lambda images: _rotated(images, 45),
    "rotated -45": lambda images: _rotated(images, -45),
    "shifted": _shifted,
}
"""What each domain does to a stack of images; sorted by name, as dealing takes them."""


def render(images: Images) -> dict[str, Images]:
    """Show every image through every domain.

    Args:
        images: (n, 8, 8), between 0 and 1. The noise on an image depends on its position, so a
            data set is rendered whole and cut afterwards.

    Returns:
        For each domain (n, 8, 8), between 0 and 1, in steps of 1/64.
    """
    return {
        name: np.round(np.clip(shift(images), 0.0, 1.0) * 64) / 64
        for name, shift in DOMAINS.items()
    }
