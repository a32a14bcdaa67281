import json
import struct

import numpy as np
import pytest

from orrery import DataError, load_snapshot

MODEL = 'action { continuous { size: 2 } } modalities { name: "image" image {} } deterministic_size: 9'


def write(path, tensors, metadata):
    """A safetensors file made by hand: length of the header, header, bytes."""
    header, data = {"__metadata__": metadata}, b""
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_reads_arrays_and_metadata(tmp_path):
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path / "s.safetensors", {"w": ("F32", weight)}, {
        "orrery.model": MODEL, "orrery.planner": "mppi { horizon: 4 }", "orrery.run": "r", "orrery.generation": "2",
        "orrery.counter": "17", "other": "kept"})
    snapshot = load_snapshot(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(snapshot.arrays["w"], weight)
    assert snapshot.model.deterministic_size == 9 and snapshot.model.action.continuous.size == 2
    assert snapshot.planner is not None and snapshot.planner.mppi.horizon == 4
    assert snapshot.run == "r" and snapshot.version == (2, 17) and snapshot.metadata["other"] == "kept"


def test_what_is_missing_has_the_formats_defaults(tmp_path):
    write(tmp_path / "s.safetensors", {"w": ("F32", np.zeros(1, np.float32))}, {"orrery.model": MODEL})
    snapshot = load_snapshot(tmp_path / "s.safetensors")
    assert snapshot.planner is None and snapshot.run == "" and snapshot.version == (0, 0)


@pytest.mark.parametrize("tensors, metadata, message", [
    ({"w": ("F32", np.zeros(1, np.float32))}, {}, "no metadata entry orrery.model"),
    ({"w": ("F32", np.zeros(1, np.float32))}, {"orrery.model": "deterministic_size: x"}, "metadata"),
    ({"w": ("F64", np.zeros(1))}, {"orrery.model": MODEL}, "'w' is float64"),
])
def test_refuses_and_names_the_file(tmp_path, tensors, metadata, message):
    write(tmp_path / "s.safetensors", tensors, metadata)
    with pytest.raises(DataError, match=rf"s\.safetensors: .*{message}"):
        load_snapshot(tmp_path / "s.safetensors")


def test_refuses_a_damaged_file(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(DataError, match=r"s\.safetensors"):
        load_snapshot(tmp_path / "s.safetensors")
