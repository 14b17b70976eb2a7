"""TFRecord files and tf.train.Example records, read without TensorFlow and without protobuf.

Comes in: a file of framed records. Goes out: for each wanted feature its list of bytes, or an array of integers or floats.

A record is: length (8 bytes, little endian), masked CRC-32C of those 8 bytes, payload, masked CRC-32C of the payload.
Both checksums are compared on every read; nothing is skipped silently.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from awscrt.checksums import crc32c

from data_pipeline.errors import DataError

HEADER_BYTES = 12
FOOTER_BYTES = 4
MASK_DELTA = 0xA282EAD8

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3  # field numbers of tf.train.Feature's three kinds

Feature = list[bytes] | np.ndarray


class Record(NamedTuple):
    """Where a record lies in its file: `offset` of the frame, `length` of the payload, in bytes."""

    offset: int
    length: int


def masked_crc(data: bytes) -> int:
    """CRC-32C in the rotated form that TFRecord stores."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def index_records(path: Path) -> list[Record]:
    """Find every record of a file by hopping over the payloads; reads 12 bytes a record.

    Raises: DataError with file and offset for a missing or cut file, or a length whose checksum does not fit.
    """
    records = []
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            offset = 0
            while offset < size:
                record = Record(offset, _payload_length(file.read(HEADER_BYTES), path, offset))
                end = offset + HEADER_BYTES + record.length + FOOTER_BYTES
                if end > size:
                    raise _truncated(path, offset, end, size)
                records.append(record)
                file.seek(end)
                offset = end
    except OSError as error:
        raise _unreadable(path, error) from error
    return records


def read_record(path: Path, record: Record) -> bytes:
    """The payload of one record. Raises DataError with file and offset when either checksum does not fit."""
    try:
        with path.open("rb") as file:
            file.seek(record.offset)
            frame = file.read(HEADER_BYTES + record.length + FOOTER_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    length = _payload_length(frame[:HEADER_BYTES], path, record.offset)
    end = HEADER_BYTES + length
    if len(frame) < end + FOOTER_BYTES:
        raise _truncated(path, record.offset, record.offset + end + FOOTER_BYTES, record.offset + len(frame))
    payload = frame[HEADER_BYTES:end]
    stored = struct.unpack_from("<I", frame, end)[0]
    if masked_crc(payload) != stored:
        raise DataError(
            f"{path}: CRC-32C of the payload={masked_crc(payload):#010x}, stored {stored:#010x}; the record at byte offset "
            f"{record.offset} ({length} bytes) is damaged; copy the file again"
        )
    return payload


def parse_example(payload: bytes, wanted: frozenset[str], where: str) -> dict[str, Feature]:
    """The `wanted` features of a serialised tf.train.Example; a feature that is absent is left out of the answer.

    Bytes lists come as list[bytes], int64 lists as int64 arrays, float lists as float32 arrays. `where` names file and
    record for the error. Unwanted features cost one hop each, whatever their size.
    """
    view = memoryview(payload)
    found: dict[str, Feature] = {}
    try:
        for field, features in _fields(view):
            if field != 1:
                continue
            for entry_field, entry in _fields(_message(features)):
                if entry_field == 1:
                    _take_entry(_message(entry), wanted, found)
    except ValueError as error:  # the checksum held, so the writer, not the disk, made this
        raise DataError(f"{where}: not a tf.train.Example, {error}; use a TFDS directory of MOVi") from None
    return found


def decode_varints(data: memoryview) -> np.ndarray:
    """Packed int64 varints -> int64 array; negative numbers take ten bytes, as protobuf writes them."""
    raw = np.frombuffer(data, np.uint8)
    if not raw.size:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(raw < 0x80)
    if not ends.size or ends[-1] != raw.size - 1:
        raise ValueError("a packed integer is cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("a packed integer is longer than ten bytes")
    place = np.arange(raw.size) - np.repeat(starts, lengths)
    septets = (raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(septets, starts).view(np.int64)


def _take_entry(entry: memoryview, wanted: frozenset[str], found: dict[str, Feature]) -> None:
    """Read one key-value pair of the feature map into `found`."""
    key, value = "", memoryview(b"")
    for field, data in _fields(entry):
        if field == 1:
            key = bytes(_message(data)).decode("utf-8")
        elif field == 2:
            value = _message(data)
    if key in wanted:
        found[key] = _feature(value)


def _feature(value: memoryview) -> Feature:
    """A tf.train.Feature; one without any list is an empty bytes list."""
    for kind, data in _fields(value):
        items = _fields(_message(data))
        if kind == BYTES_LIST:
            return [bytes(_message(item)) for field, item in items if field == 1]
        if kind == FLOAT_LIST:
            parts = [np.frombuffer(_message(item), "<f4") for field, item in items if field == 1]
            return np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if kind == INT64_LIST:
            ints = [_integers(item) for field, item in items if field == 1]
            return np.concatenate(ints) if ints else np.zeros(0, np.int64)
    return []


def _integers(item: memoryview | int) -> np.ndarray:
    """Packed integers, or the single one of an unpacked list."""
    if isinstance(item, int):
        return np.array([item], np.uint64).view(np.int64)
    return decode_varints(item)


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Walk a protobuf message: (field number, its bytes, or its number for a varint). Raises ValueError when malformed."""
    offset = 0
    while offset < len(view):
        tag, offset = _varint(view, offset)
        field, wire = tag >> 3, tag & 7
        if wire == VARINT:
            number, offset = _varint(view, offset)
            yield field, number
            continue
        if wire == LENGTH_DELIMITED:
            length, offset = _varint(view, offset)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} is not known")
        if offset + length > len(view):
            raise ValueError(f"a field of {length} bytes overruns its message")
        yield field, view[offset : offset + length]
        offset += length


def _varint(view: memoryview, offset: int) -> tuple[int, int]:
    """One varint at `offset`: (value, offset behind it)."""
    value = 0
    for place in range(10):
        if offset >= len(view):
            raise ValueError("a number is cut off")
        byte = view[offset]
        offset += 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, offset
    raise ValueError("a number is longer than ten bytes")


def _message(data: memoryview | int) -> memoryview:
    if isinstance(data, int):
        raise ValueError("a number stands where a message belongs")
    return data


def _payload_length(header: bytes, path: Path, offset: int) -> int:
    if len(header) < HEADER_BYTES:
        raise _truncated(path, offset, offset + HEADER_BYTES, offset + len(header))
    length, stored = struct.unpack("<QI", header)
    if masked_crc(header[:8]) != stored:
        raise DataError(
            f"{path}: CRC-32C of the length={masked_crc(header[:8]):#010x}, stored {stored:#010x}; the record at byte offset "
            f"{offset} is damaged, or the file is no TFRecord; copy the file again"
        )
    return length


def _truncated(path: Path, offset: int, needed: int, size: int) -> DataError:
    return DataError(
        f"{path}: truncated record at byte offset {offset}; it ends at byte {needed}, the file has {size}; copy the file again"
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read, {error.strerror or error}; the directory must be complete; copy the file again")
