"""Changes of files of arrays that keep the file whole round them: npy, npz, safetensors, torch's zip."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from functools import cache
from random import Random

from fuzzing import odd, trees
from fuzzing.plain import LARGEST, bytewise

DESCRS = (
    "'|O'", "'|V8'", "'<U1000000000'", "'<M8[ns]'", "'<f2'", "'<f8'", "'<f16'", "'<c16'", "'|b1'", "'|u1'", "'<i8'",
    "'>i4'",
    "'<u8'", "'|S0'", "'<i3'", "'x'", "[('a', '|O')]", "[('a', '<i4'), ('b', '<i4')]", "('<i4', (3,))", "None", "3",
)  # fmt: skip
SHAPES = (
    "()", "(0,)", "(1,)", "(0, 2, 2)", "(-1,)", "(-1, 2, 2)", "(2**62,)", "(4611686018427387904, 2)", "(10**15, 2, 2)",
    "(1, 1, 1, 1, 1)", "(True,)", "(1.0,)", "3", "None", "(2, 10**9, 10**9)", "(18446744073709551616,)", "(1,) * 40",
)  # fmt: skip
NAMES = (
    "../canary.npy", "/tmp/canary.npy", "ids", "ids.npy", "expert_ids.npy", "weights.npy", "request.npy", "phase.npy",
    "", ".npy", "\x00.npy", "layer_ids.npy", "x" * 3000, "position.npy", "token.npy", "domain.npy", "scores.npy",
)  # fmt: skip
BOMB_BYTES = 300 << 20  # more than a reader may hold, and quick to inflate


def deflated(head: bytes, block: bytes, n_bytes: int) -> bytes:
    """A deflate stream of the head and then the block again and again: its packed form is repeated as it is."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + again * (n_bytes // max(1, len(block))) + packer.flush(zlib.Z_FINISH)


def npy(data: bytes, rng: Random) -> bytes:
    """The header says something else than the numbers are."""
    if rng.random() < 0.2 or data[:6] != b"\x93NUMPY" or len(data) < 10:
        return bytewise(data, rng)
    (length,) = struct.unpack_from("<H", data, 8)
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    how = rng.randrange(7)
    if how == 0:
        header = _replaced(header, "'descr': ", ", 'fortran", rng.choice(DESCRS))
    elif how == 1:
        header = _replaced(header, "'shape': ", ", }", rng.choice(SHAPES))
    elif how == 2:
        header = header.replace("False", rng.choice(("True", "None", "0", "[]")))
    elif how == 3:
        return npy_with(header, bytewise(body, rng), rng)
    elif how == 4:
        return data[:6] + bytes([rng.randrange(5), rng.randrange(3)]) + data[8:]
    elif how == 5:
        header = rng.choice(
            ("{", "[]", "{}", "(" * 300, "'a' * 9", "x" * 20_000, "{1: 2}", header + header)
        )
    else:
        header = bytewise(header.encode("latin1"), rng).decode("latin1")
    return npy_with(header, body, rng)


def npy_with(header: str, body: bytes, rng: Random) -> bytes:
    text = header.rstrip(" \n").encode("latin1", "replace")[:60_000]
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    length = rng.choice(odd.SIZES) % 65536 if rng.random() < 0.05 else len(text)
    return (b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text + body)[:LARGEST]


def _replaced(text: str, before: str, after: str, fresh: str) -> str:
    start = text.find(before)
    stop = text.find(after, start + len(before))
    return text if min(start, stop) < 0 else text[: start + len(before)] + fresh + text[stop:]


def npz(data: bytes, rng: Random) -> bytes:
    return zipped(data, rng, {".npy": npy})


def zipped(data: bytes, rng: Random, inside: dict[str, object]) -> bytes:
    """Members changed, renamed, doubled, taken away, or swapped; directories that lie; bombs."""
    if rng.random() < 0.2:
        return bytewise(data, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            is_bomb = sum(one.file_size for one in archive.infolist()) > LARGEST
            members = (
                [] if is_bomb else [(one.filename, archive.read(one)) for one in archive.infolist()]
            )
    except Exception:  # an earlier change has broken the frame
        return bytewise(data, rng)
    if not members:
        return bytewise(data, rng)
    i, how = rng.randrange(len(members)), rng.random()
    name, body = members[i]
    if how < 0.6:
        change = next((f for end, f in inside.items() if name.endswith(end)), bytewise)
        members[i] = name, change(body, rng)  # type: ignore[operator]
    elif how < 0.68:
        members[i] = rng.choice(NAMES), body
    elif how < 0.74:
        del members[i]
    elif how < 0.8:
        members.append((name, rng.choice(members)[1]))
    elif how < 0.86:
        j = rng.randrange(len(members))
        members[i], members[j] = (name, members[j][1]), (members[j][0], body)
    packed = _zip(members, rng)
    if how >= 0.98:
        return _with_bomb(members, i)
    return (
        bytewise(packed, rng)
        if 0.86 <= how < 0.9
        else _lying(packed, rng)
        if how >= 0.9
        else packed
    )


def _zip(members: list[tuple[str, bytes]], rng: Random) -> bytes:
    packed = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.3 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(packed, "w", kind, compresslevel=1) as archive:
        warnings.simplefilter("ignore")  # a name twice is what is wanted
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name or "x"), body, kind, 1)
    return packed.getvalue()[:LARGEST]


def _lying(packed: bytes, rng: Random) -> bytes:
    """A size, an offset or a method of the zip's directory."""
    signature, fields = rng.choice(
        ((b"PK\x01\x02", (8, 10, 16, 20, 24, 28, 42)), (b"PK\x03\x04", (6, 8, 14, 18, 22, 26)))
    )
    at = packed.find(signature) + rng.choice(fields)
    fresh = struct.pack("<I", rng.choice(odd.SIZES) % (1 << 32))[: rng.choice((2, 4))]
    return packed[:at] + fresh + packed[at + len(fresh) :]


def _with_bomb(members: list[tuple[str, bytes]], i: int) -> bytes:
    """The i-th member's numbers go on for hundreds of megabytes of zeros."""
    name = members[i][0]
    text = (
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({BOMB_BYTES >> 4}, 4, 4), }}".ljust(
            117
        )
        + "\n"
    )
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    packed, whole = deflated(header, bytes(1 << 20), BOMB_BYTES), len(header) + BOMB_BYTES
    raw = name.encode() or b"x"
    sizes = struct.pack("<IIIHH", _crc(header), len(packed), whole, len(raw), 0)
    local = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 8, 0, 33) + sizes + raw
    central = (
        b"PK\x01\x02"
        + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 33)
        + sizes
        + bytes(8)
        + struct.pack("<II", 0, 0)[:4]
    )
    central = central[:34] + bytes(8) + struct.pack("<I", 0) + raw
    start = len(local) + len(packed)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), start, 0)
    return local + packed + central + end


@cache
def _crc(header: bytes) -> int:
    crc = zlib.crc32(header)
    for _ in range(BOMB_BYTES >> 20):
        crc = zlib.crc32(bytes(1 << 20), crc)
    return crc


def safetensors(data: bytes, rng: Random) -> bytes:
    """The JSON header changed and put back with its length, or with a length that is wrong."""
    if rng.random() < 0.2 or len(data) < 8:
        return bytewise(data, rng)
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = data[8:start], data[start:]
    if rng.random() < 0.2:
        body = bytewise(body, rng)
    else:
        header = trees.json_file(header, rng)
    length = rng.choice(odd.SIZES) if rng.random() < 0.05 else len(header)
    return (struct.pack("<Q", length) + header + body)[:LARGEST]
