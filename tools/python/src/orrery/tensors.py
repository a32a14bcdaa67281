"""numpy arrays to and from the tensors of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.common.v1 import tensor_pb2
from orrery.errors import DataError
from orrery.specification import DTYPES

Observation = Mapping[str, npt.NDArray[Any]]


def to_named_tensor(name: str, array: npt.NDArray[Any]) -> tensor_pb2.NamedTensor:
    """DataError for another dtype than the wire knows."""
    if array.dtype.name not in DTYPES:
        raise DataError(f"{name!r} is {array.dtype}: expected one of {', '.join(DTYPES)}")
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    # DataType has the numbers of DTYPES, from 1.
    kind = tensor_pb2.DataType.Name(DTYPES.index(array.dtype.name) + 1)
    return tensor_pb2.NamedTensor(
        name=name, tensor=tensor_pb2.Tensor(data_type=kind, shape=list(array.shape), data=data))


def from_tensor(tensor: tensor_pb2.Tensor, what: str) -> npt.NDArray[Any]:
    """DataError naming `what` unless dtype, shape and number of bytes fit each other."""
    if not 1 <= tensor.data_type <= len(DTYPES):
        raise DataError(f"{what}: unknown data_type {tensor.data_type}")
    kind = np.dtype(DTYPES[tensor.data_type - 1])
    size = kind.itemsize
    for dimension in tensor.shape:
        if dimension < 0:
            raise DataError(f"{what}: shape {list(tensor.shape)} has a negative size")
        size *= dimension
    if size != len(tensor.data):
        raise DataError(f"{what}: {kind}{list(tensor.shape)} takes {size} bytes, got {len(tensor.data)}")
    return np.frombuffer(tensor.data, kind.newbyteorder("<")).astype(kind).reshape(tuple(tensor.shape))
