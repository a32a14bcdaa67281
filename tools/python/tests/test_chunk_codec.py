import binascii
import struct

import numpy as np
import pytest

from orrery import DataError, decode_rows, encode_rows

# Two rows, fields "a" (uint8 [2], no compression) and "b" (float32 scalar), written by hand after docs/replay_storage.md.
BY_HAND = bytes.fromhex(
    "4f52434b" "0100" "0200" "02000000"
    "01" "61" "01" "00" "01" "02000000" "0400000000000000" "01020304"
    "01" "62" "04" "00" "00" "0800000000000000" "0000803f" "000000c0")
BY_HAND += struct.pack("<I", binascii.crc32(BY_HAND))
FIELDS = {"b": np.array([1, -2], np.float32), "a": np.array([[1, 2], [3, 4]], np.uint8)}


def seal(payload):
    return payload[:-4] + struct.pack("<I", binascii.crc32(payload[:-4]))


def test_encodes_the_bytes_of_the_format():
    assert encode_rows(FIELDS) == BY_HAND


def test_decodes_the_bytes_of_the_format():
    fields = decode_rows(BY_HAND, 2)
    assert fields.keys() == FIELDS.keys()
    for name, array in fields.items():
        assert array.dtype == FIELDS[name].dtype
        np.testing.assert_array_equal(array, FIELDS[name])


def test_compresses_differences_in_time():
    zstandard = pytest.importorskip("zstandard")
    pictures = (np.arange(3 * 300) // 7 * 5 % 256).astype(np.uint8).reshape(3, 300)
    payload = encode_rows({"image": pictures})
    # Header 12, then length and name 6, then dtype, encoding, rank 3, size 4, length 8.
    assert payload[19] == 1, "encoding"
    packed = payload[12 + 6 + 3 + 4 + 8:-4]
    delta = np.frombuffer(zstandard.ZstdDecompressor().decompress(packed), np.uint8).reshape(3, 300)
    np.testing.assert_array_equal(delta[0], pictures[0])
    np.testing.assert_array_equal((delta[1].astype(int) + pictures[0]) % 256, pictures[1])
    np.testing.assert_array_equal(decode_rows(payload, 3)["image"], pictures)


def test_gives_back_every_bit():
    random = np.random.default_rng(0)
    fields = {
        "image": random.integers(0, 256, (5, 32, 32, 3), np.uint8), "still": np.full((5, 300), 7, np.uint8),
        "joints": random.normal(size=(5, 26)).astype(np.float32), "wide": random.normal(size=(5,)),
        "count": random.integers(-(2**62), 2**62, (5, 2)), "small": random.integers(-5, 5, (5,), np.int32)}
    for name, array in decode_rows(encode_rows(fields), 5).items():
        assert array.dtype == fields[name].dtype
        np.testing.assert_array_equal(array, fields[name])


@pytest.mark.parametrize("fields, message", [
    ({}, "got 0"),
    ({"a": np.zeros((0, 2), np.uint8)}, "at least 1 row"),
    ({"a": np.zeros(2, np.uint8), "b": np.zeros(3, np.uint8)}, "'b'.*expected 2 rows"),
    ({"a": np.zeros(2, np.float16)}, "float16.*expected one of"),
    ({"x" * 256: np.zeros(2, np.uint8)}, "1 to 255 bytes"),
    ({"a": np.zeros((2,) + (1,) * 9, np.uint8)}, "more than 8"),
])
def test_refuses_to_encode(fields, message):
    with pytest.raises(DataError, match=message):
        encode_rows(fields)


@pytest.mark.parametrize("payload, message", [
    (b"ORCK", "cut short"),
    (BY_HAND[:-1] + b"x", "checksum"),
    (seal(b"ORCX" + BY_HAND[4:]), "not a chunk"),
    (seal(BY_HAND[:4] + b"\2" + BY_HAND[5:]), "version 2"),
    (seal(BY_HAND[:8] + b"\3" + BY_HAND[9:]), "3 rows, expected 2"),
    (seal(BY_HAND[:6] + b"\1" + BY_HAND[7:]), "left over"),
    (seal(BY_HAND[:6] + b"\3" + BY_HAND[7:]), "cut short"),
    (seal(BY_HAND[:14] + b"\6" + BY_HAND[15:]), "unknown dtype 6"),
    (seal(BY_HAND[:15] + b"\2" + BY_HAND[16:]), "encoding 2"),
    (seal(BY_HAND[:16] + b"\11" + BY_HAND[17:]), "rank 9"),
    (seal(BY_HAND[:17] + b"\3" + BY_HAND[18:]), "size of a raw field"),
    (seal(BY_HAND[:20] + b"\x7f" + BY_HAND[21:]), "claims"),
])
def test_refuses_damaged_payloads(payload, message):
    with pytest.raises(DataError, match=message):
        decode_rows(payload, 2)


def test_every_cut_is_noticed():
    for size in range(len(BY_HAND) - 4):
        with pytest.raises(DataError):
            decode_rows(seal(BY_HAND[:size] + b"    "), 2)
