"""Reads snapshots (docs/snapshot_format.md) without Torch."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
from google.protobuf import text_format

from orrery.config.v1 import model_pb2, planner_pb2
from orrery.errors import DataError


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Parameters by name (docs/model.md) as float32 arrays, and what the file says about them."""

    arrays: dict[str, npt.NDArray[np.float32]]
    metadata: dict[str, str]
    model: model_pb2.Model
    planner: planner_pb2.Planner | None  # None: the file names none
    run: str
    version: tuple[int, int]  # generation, counter; (0, 0): the file names none


def load_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """DataError names the file and what is wrong with it; OSError when it cannot be read."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            arrays: dict[str, npt.NDArray[Any]] = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: {error}") from error
    if "orrery.model" not in metadata:
        raise DataError(f"{path}: no metadata entry orrery.model: expected a snapshot of a world model")
    try:
        model = text_format.Parse(metadata["orrery.model"], model_pb2.Model())
        planner = None
        if "orrery.planner" in metadata:
            planner = text_format.Parse(metadata["orrery.planner"], planner_pb2.Planner())
        version = (int(metadata.get("orrery.generation", "0")), int(metadata.get("orrery.counter", "0")))
    except (text_format.ParseError, ValueError) as error:
        raise DataError(f"{path}: metadata: {error}") from error
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise DataError(f"{path}: tensor {name!r} is {array.dtype}: expected float32")
    return Snapshot(arrays, metadata, model, planner, metadata.get("orrery.run", ""), version)
