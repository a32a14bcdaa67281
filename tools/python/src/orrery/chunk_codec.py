"""Rows of a chunk as bytes (docs/replay_storage.md): per field name, dtype, shape and bytes, and a checksum."""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orrery.errors import DataError
from orrery.specification import DTYPES

try:
    zstandard: Any = importlib.import_module("zstandard")
except ImportError:  # optional: chunks are then written raw
    zstandard = None

_MAGIC = b"ORCK"
_VERSION = 1
_RAW = 0
_DELTA_ZSTD = 1
_MAX_RANK = 8
_COMPRESS_FROM_ROW_BYTES = 256
_ZSTD_LEVEL = 1

Rows = Mapping[str, npt.NDArray[Any]]


def encode_rows(fields: Rows) -> bytes:
    """Every array's first dimension is the number of rows, at least 1; dtypes uint8, int32, int64, float32, float64.
    uint8 fields of 256 bytes a row or more are compressed when the package `zstandard` is installed. DataError names the
    field."""
    if not 1 <= len(fields) <= 65535:
        raise DataError(f"expected 1 to 65535 fields, got {len(fields)}")
    names = sorted(fields, key=str.encode)
    rows = fields[names[0]].shape[0] if fields[names[0]].ndim > 0 else 0
    if rows < 1:
        raise DataError(f"field {names[0]!r}: expected at least 1 row")
    out = bytearray(_MAGIC + struct.pack("<HHI", _VERSION, len(names), rows))
    for name in names:
        out += _encode_field(name, fields[name], rows)
    out += struct.pack("<I", zlib.crc32(out))
    return bytes(out)


def _encode_field(name: str, array: npt.NDArray[Any], rows: int) -> bytes:
    def refuse(what: str) -> DataError:
        return DataError(f"field {name!r} {array.dtype}{list(array.shape)}: {what}")

    encoded = name.encode()
    if not 1 <= len(encoded) <= 255:
        raise refuse("its name must have 1 to 255 bytes")
    if array.dtype.name not in DTYPES:
        raise refuse(f"expected one of {', '.join(DTYPES)}")
    if array.ndim == 0 or array.shape[0] != rows:
        raise refuse(f"expected {rows} rows")
    if array.ndim - 1 > _MAX_RANK:
        raise refuse(f"a row has more than {_MAX_RANK} dimensions")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    data = array.tobytes()
    packed = _compress(array) if array.dtype == np.uint8 and len(data) // rows >= _COMPRESS_FROM_ROW_BYTES else None
    encoding = _RAW if packed is None else _DELTA_ZSTD
    body = data if packed is None else packed
    head = struct.pack("<B", len(encoded)) + encoded
    head += struct.pack("<BBB", DTYPES.index(array.dtype.name) + 1, encoding, array.ndim - 1)
    head += struct.pack(f"<{array.ndim - 1}I", *array.shape[1:])
    return head + struct.pack("<Q", len(body)) + body


def _compress(array: npt.NDArray[np.uint8]) -> bytes | None:
    """Differences in time (modulo 256), compressed; None when that is not possible or not smaller."""
    if zstandard is None:
        return None
    delta = array.copy()
    delta[1:] -= array[:-1]
    packed: bytes = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True).compress(delta.tobytes())
    return packed if len(packed) < array.nbytes else None


class _Reader:
    """Takes from the front of a payload; DataError at its end."""

    def __init__(self, data: bytes):
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise _damaged("cut short")
        self._at += size
        return self._data[self._at - size : self._at]

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    @property
    def empty(self) -> bool:
        return self._at == len(self._data)


def _damaged(what: str) -> DataError:
    return DataError(f"damaged chunk payload: {what}")


def decode_rows(payload: bytes, rows: int, max_bytes: int = 1 << 30) -> dict[str, npt.NDArray[Any]]:
    """Fields by name, each [rows, …]. DataError for a damaged payload, another number of rows, or more than `max_bytes`
    decoded; nothing is allocated beyond what was checked."""
    if len(payload) < 16:
        raise _damaged("cut short")
    if zlib.crc32(payload[:-4]) != struct.unpack("<I", payload[-4:])[0]:
        raise _damaged("checksum")
    reader = _Reader(payload[:-4])
    if reader.take(4) != _MAGIC:
        raise _damaged("not a chunk")
    version, count, claimed = reader.unpack("HHI")
    if version != _VERSION:
        raise _damaged(f"version {version}, expected {_VERSION}")
    if claimed != rows or rows < 1:
        raise _damaged(f"{claimed} rows, expected {rows}")
    fields: dict[str, npt.NDArray[Any]] = {}
    for _ in range(count):
        name, array = _decode_field(reader, rows, max_bytes)
        if name in fields:
            raise _damaged("a field occurs twice")
        fields[name] = array
        max_bytes -= array.nbytes
    if not reader.empty:
        raise _damaged("bytes left over")
    return fields


def _decode_field(reader: _Reader, rows: int, budget: int) -> tuple[str, npt.NDArray[Any]]:
    (length,) = reader.unpack("B")
    try:
        name = reader.take(length).decode()
    except UnicodeDecodeError as error:
        raise _damaged("a name that is not UTF-8") from error
    dtype, encoding, rank = reader.unpack("BBB")
    if not 1 <= dtype <= len(DTYPES):
        raise _damaged(f"unknown dtype {dtype}")
    if rank > _MAX_RANK:
        raise _damaged(f"rank {rank}")
    shape = (rows, *reader.unpack(f"{rank}I"))
    (size,) = reader.unpack("Q")
    data = reader.take(size)
    kind = np.dtype(DTYPES[dtype - 1]).newbyteorder("<")
    expected = kind.itemsize
    for dimension in shape:
        expected *= dimension
    if expected > budget:
        raise _damaged(f"claims {expected} bytes where at most {budget} are expected")
    if encoding == _DELTA_ZSTD and kind == np.uint8 and expected > 0:
        return name, _decompress(data, expected).reshape(shape).cumsum(axis=0, dtype=np.uint8)
    if encoding != _RAW:
        raise _damaged(f"encoding {encoding}")
    if size != expected:
        raise _damaged("size of a raw field")
    return name, np.frombuffer(data, kind).reshape(shape).astype(DTYPES[dtype - 1])


def _decompress(packed: bytes, size: int) -> npt.NDArray[np.uint8]:
    if zstandard is None:
        raise DataError("a compressed field: install the package zstandard to read it")
    try:
        if zstandard.frame_content_size(packed) != size:
            raise _damaged("size of a compressed field")
        data = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise _damaged(f"compressed field: {error}") from error
    return np.frombuffer(data, np.uint8)
