"""What a plain tar holds and where, from its headers alone. Part of reading shards that others wrote.

Comes in: a tar file. Goes out: the name, offset and size of every regular file in it. Nothing is extracted, so no path in the
archive can matter, and a tar that was cut is noticed, also one cut between two members: it lacks the two empty blocks at its end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import DataError

BLOCK = 512
REGULAR, DIRECTORY, LONG_NAME, PAX, PAX_GLOBAL = (b"0", b"\0"), b"5", b"L", b"x", b"g"
LARGEST_EXTRA = 1 << 20  # a long name or a set of attributes takes less
REMEDY = "copy the shard again"


class Member(NamedTuple):
    """A file in a tar: its first byte lies at `offset`."""

    name: str
    offset: int
    size: int


def index_tar(path: Path) -> list[Member]:
    """Every regular file of a tar in order. Raises DataError with the byte offset where the archive is damaged or cut."""
    try:
        with path.open("rb", buffering=0) as file:
            return _walk(path, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror or error}; {REMEDY}") from error


def read_member(path: Path, member: Member) -> bytes:
    """Raises DataError when the shard cannot be read or became shorter."""
    try:
        with path.open("rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
    except OSError as error:
        raise DataError(f"{path}, member {member.name}: cannot be read, {error.strerror or error}; {REMEDY}") from error
    if len(data) < member.size:
        raise DataError(f"{path}, member {member.name}: ends {member.size - len(data)} bytes early; it must be whole; {REMEDY}")
    return data


def _walk(path: Path, file: int, total: int) -> list[Member]:
    members: list[Member] = []
    attributes: dict[str, str] = {}  # of the next member: what its own header has no room for
    offset = 0
    while True:
        where = f"{path}, byte offset {offset}"
        header = os.pread(file, BLOCK, offset)
        if header == bytes(BLOCK):
            break
        if len(header) < BLOCK:
            raise DataError(f"{where}: the tar ends without its two empty blocks; it is cut, perhaps between members; {REMEDY}")
        kind, name, size = _header(header, where)
        if kind not in (PAX, LONG_NAME):
            name, size = attributes.get("path", name), _decimal(attributes.get("size", str(size)), where)
        data, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
        if offset > total:
            raise DataError(f"{where}: member {name} of {size} bytes, the file ends at {total}; it is cut; {REMEDY}")
        if kind in (PAX, LONG_NAME):
            attributes |= _extra(kind, os.pread(file, size, data), where) if size <= LARGEST_EXTRA else _refuse(kind, where)
            continue
        attributes = {}
        if kind in REGULAR:
            members.append(Member(name, data, size))
        elif kind not in (DIRECTORY, PAX_GLOBAL):
            _refuse(kind, where)
    if os.pread(file, BLOCK, offset + BLOCK) != bytes(BLOCK):
        raise DataError(f"{path}, byte offset {offset}: one empty block where a tar ends with two; it is damaged; {REMEDY}")
    return members


def _header(header: bytes, where: str) -> tuple[bytes, str, int]:
    """(kind, name, size), once the header's own sum is right."""
    stored, found = _number(header[148:156], where), sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    if stored != found:
        raise DataError(f"{where}: header sum {found}, stored {stored}; this is no tar, or it is damaged; {REMEDY}")
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""  # GNU's own magic differs: other fields lie there
    return header[156:157], f"{prefix}/{name}" if prefix else name, _number(header[124:136], where)


def _number(field: bytes, where: str) -> int:
    """Octal digits, or a big-endian number behind a byte 0x80 for what octal digits cannot hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _decimal(field.strip(b" \0").decode("ascii", "replace") or "0", where, base=8)


def _decimal(text: str, where: str, base: int = 10) -> int:
    digits = "0123456789"[:base]
    if not text or len(text) > 20 or any(letter not in digits for letter in text):
        raise DataError(f"{where}: {text[:20]!r} where a number must stand; this is no tar, or it is damaged; {REMEDY}")
    return int(text, base)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _extra(kind: bytes, data: bytes, where: str) -> dict[str, str]:
    """The name and size that the next member has, from records `<length> <key>=<value>\\n` or from a GNU long name."""
    if kind == LONG_NAME:
        return {"path": _text(data)}
    found: dict[str, str] = {}
    while data:
        length = _decimal(data.split(b" ", 1)[0].decode("ascii", "replace"), where)
        key, separator, value = data[:length].partition(b" ")[2].partition(b"=")
        if not separator or not value.endswith(b"\n") or len(data) < length:
            raise DataError(f"{where}: a broken record of attributes; the tar is damaged; {REMEDY}")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "replace")
        data = data[length:]
    return {key: found[key] for key in ("path", "size") if key in found}


def _refuse(kind: bytes, where: str) -> dict[str, str]:
    raise DataError(f"{where}: an entry of kind {kind!r}; files and folders alone belong in a shard; write it as a plain tar")
