"""Pictures made smaller by averaging areas, so that thin things stay visible."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.errors import DataError


@functools.lru_cache(maxsize=64)
def _weights(size_in: int, size_out: int) -> npt.NDArray[np.float32]:
    """[size_out, size_in]: the share of each input pixel in each output pixel; rows sum to 1."""
    edges = np.arange(size_out + 1) * (size_in / size_out)
    lower = np.maximum(edges[:-1, None], np.arange(size_in)[None, :])
    upper = np.minimum(edges[1:, None], np.arange(1, size_in + 1)[None, :])
    weights: npt.NDArray[np.float32] = (np.maximum(upper - lower, 0) * (size_out / size_in)).astype(np.float32)
    return weights


def resize(picture: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """[h, w, channels] uint8 to [height, width, channels] uint8: each pixel is the mean of the area that it covers, rounded."""
    if picture.shape[:2] == (height, width):
        return picture
    rows = np.tensordot(_weights(picture.shape[0], height), picture.astype(np.float32), axes=(1, 0))  # [height, w, c]
    both = np.tensordot(_weights(picture.shape[1], width), rows, axes=(1, 1))  # [width, height, c]
    small: npt.NDArray[np.uint8] = np.clip(np.floor(both.transpose(1, 0, 2) + 0.5), 0, 255).astype(np.uint8)
    return small


def as_picture(value: Any, what: str) -> npt.NDArray[np.uint8]:
    """[height, width, channels] uint8; a grey [height, width] gets a channel, [channels, height, width] is turned. DataError
    names `what`."""
    picture = np.asarray(value)
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or 0 in picture.shape:
        raise DataError(f"{what} is {picture.dtype}{list(picture.shape)}: expected a picture, uint8 [height, width, channels]")
    if picture.ndim == 2:
        return picture[:, :, None]
    return picture.transpose(1, 2, 0) if _channels_first(picture.shape) else picture


def is_picture(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    """Whether arrays of this kind are pictures rather than numbers."""
    if dtype != np.uint8 or len(shape) not in (2, 3):
        return False
    return min(shape[:2]) > 16 and (len(shape) == 2 or shape[2] <= 16) or _channels_first(shape)


def channels_of(shape: tuple[int, ...]) -> int:
    """Channels of a picture of this shape."""
    return 1 if len(shape) == 2 else shape[0] if _channels_first(shape) else shape[2]


def _channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] <= 16 and min(shape[1:]) > 16
