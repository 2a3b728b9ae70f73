"""Changes of binary streams by what they are made of: pickles, protobuf in a W&B log, GGUF, gzip."""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import struct
import zlib
from random import Random

from fuzzing import arrays, odd, trees
from fuzzing.plain import LARGEST, Mutator, bytewise
from prefetch.runs.tracked import BLOCK, HEADER, MAGIC

GLOBALS = (
    b"os\nsystem", b"posix\nsystem", b"builtins\neval", b"builtins\nexec", b"subprocess\nPopen", b"numpy\nload",
    b"shutil\nrmtree",
    b"numpy.core.multiarray\n_reconstruct", b"numpy\nndarray", b"numpy\ndtype", b"collections\nOrderedDict",
    b"_codecs\nencode", b"torch._utils\n_rebuild_tensor_v2", b"torch.storage\n_load_from_bytes",
    b"torch.storage\nUntypedStorage",
    b"numpy.core.numeric\n_frombuffer", b"numpy.core.multiarray\nscalar", b"builtins\ngetattr",
    b"types\nSimpleNamespace",
    b"torch\nload", b"numpy.testing._private.utils\nruncode",
)  # fmt: skip
PROGRAMS = (
    b"cos\nsystem\n(S'touch canary'\ntR.", b"\x80\x02cbuiltins\nexec\nX\x05\x00\x00\x00a = 1\x85R.",
    b"cnumpy\ndtype\n(S'O'\nI00\nI01\ntR.", b"\x80\x04r\xff\xff\xff\x7f.", b"\x80\x04]r\xff\xff\xff\x0f.",
    b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x3fa.", b"\x80\x05\x96\x00\x00\x00\x00\x04\x00\x00\x00a.",
    b"\x80\x04\x95\x00\x00\x00\x00\x10\x00\x00\x00a.", b"\x80\x02\x8b\xff\xff\xff\x7fa.",
    b"\x80\x04" + b"(" * 60_000 + b".",
    b"\x80\x04]" + b"\x85" * 60_000 + b".", b"P1\n.", b"\x80\x04K\x01Q.", b"\x82\x01.", b"\x80\x05\x97.",
    b"I" + b"9" * 9000 + b"\n.",
    b"ccollections\nOrderedDict\n)R}S'a'\nK\x01sb.", b"\x80\x09.", b"S'a'\nS'b'\nb.", b"c\n\n.",
    b"\x80\x04" + b"]" * 50_000 + b"." ,
    b"\x80\x04](" + b"2" * 20 + b"ld.",
    b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(K\x05tcnumpy\ndtype\n(S'i8'\ntRI00\nS''\ntb.",
)  # fmt: skip


def pickled(data: bytes, rng: Random) -> bytes:
    """Operations taken away, doubled, moved; names of others; numbers; whole programs."""
    if rng.random() < 0.08:
        return rng.choice(PROGRAMS) if rng.random() < 0.6 else data[:-1] + rng.choice(PROGRAMS)
    try:
        ops = [(op.name, at) for op, _, at in pickletools.genops(io.BytesIO(data))]
    except Exception:  # an earlier change has broken it
        return bytewise(data, rng)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(ops))
        name, start = ops[at]
        stop = ops[at + 1][1] if at + 1 < len(ops) else len(data)
        data = data[:start] + _op(data[start:stop], name, data, ops, rng) + data[stop:]
    return data[:LARGEST]


def _op(op: bytes, name: str, data: bytes, ops: list[tuple[str, int]], rng: Random) -> bytes:
    how = rng.random()
    if name in ("GLOBAL", "SHORT_BINUNICODE") and how < 0.5:
        text = rng.choice(GLOBALS)
        part = rng.choice(text.split(b"\n"))
        return b"c" + text + b"\n" if name == "GLOBAL" else b"\x8c" + bytes([len(part)]) + part
    if how < 0.25:
        return b""
    if how < 0.4:
        return op + op
    if how < 0.6:
        there = rng.randrange(len(ops))
        stop = ops[there + 1][1] if there + 1 < len(ops) else len(data)
        return data[ops[there][1] : stop][:20_000]
    if how < 0.8 and len(op) > 1:
        fresh = odd.integer(rng)[: len(op) - 1]
        return op[:1] + fresh + op[1 + len(fresh) :]
    few = pickle.dumps(rng.choice((None, 1, -1, 2**40, "a", b"a", (), [], {}, 1.5, True)), 2)[2:-1]
    return few if how < 0.95 else bytewise(op, rng)


def torch_file(data: bytes, rng: Random) -> bytes:
    return arrays.zipped(data, rng, {"data.pkl": pickled})


def wandb(data: bytes, rng: Random) -> bytes:
    """A record's fields changed, with its length and checksum put right again."""
    if rng.random() < 0.15:
        return bytewise(data, rng)
    records = _records(data)
    if not records:
        return bytewise(data, rng)
    i, how = rng.randrange(len(records)), rng.random()
    if how < 0.75:
        records[i] = message(records[i], rng)
    elif how < 0.85:
        records.insert(rng.randrange(len(records)), records[i])
    elif how < 0.95:
        del records[i]
    else:
        records[i] = b""
    return logged(records)[:LARGEST]


def _records(data: bytes) -> list[bytes]:
    """Whole records of a log that fits one block."""
    found, at = [], len(MAGIC)
    while at + HEADER <= min(len(data), BLOCK):
        _, size, _ = struct.unpack_from("<IHB", data, at)
        found.append(data[at + HEADER : at + HEADER + size])
        at += HEADER + size
    return found


def logged(records: list[bytes]) -> bytes:
    log = MAGIC
    for record in records:
        parts = [record[i : i + 30_000] for i in range(0, len(record), 30_000)] or [b""]
        for place, part in enumerate(parts):
            kind = (
                1 if len(parts) == 1 else 2 if place == 0 else 4 if place == len(parts) - 1 else 3
            )
            if BLOCK - len(log) % BLOCK < HEADER + len(part):
                log += bytes(BLOCK - len(log) % BLOCK) if BLOCK - len(log) % BLOCK < HEADER else b""
            log += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
    return log


def message(data: bytes, rng: Random, depth: int = 0) -> bytes:
    """One field of protobuf's wire format, however deep; JSON inside is changed as JSON."""
    fields = fields_of(data)
    if not fields or depth > 6 or rng.random() < 0.08:
        return bytewise(data, rng)
    i = rng.randrange(len(fields))
    number, kind, value = fields[i]
    how = rng.random()
    if how < 0.1:
        del fields[i]
    elif how < 0.2:
        fields.append(fields[i])
    elif how < 0.3:
        fields[i] = rng.choice((1, 2, 3, 4, 5, 6, 8, 16, 17, 18, 100, 2**20)), kind, value
    elif kind == 2:
        fields[i] = number, kind, _inside(value, rng, depth)
    else:
        fields[i] = number, kind, bytewise(value, rng)
    return b"".join(field(*one) for one in fields)


def _inside(value: bytes, rng: Random, depth: int) -> bytes:
    if value[:1] in b'{["' or value[:1].isdigit():
        return trees.json_file(value, rng)
    if fields_of(value) and rng.random() < 0.85:
        return message(value, rng, depth + 1)
    return (
        rng.choice(odd.TEXTS).encode("utf-8", "surrogatepass")
        if rng.random() < 0.4
        else bytewise(value, rng)
    )


def fields_of(data: bytes) -> list[tuple[int, int, bytes]]:
    """(number, wire type, its bytes); empty where it is no message."""
    found: list[tuple[int, int, bytes]] = []
    at = 0
    try:
        while at < len(data):
            tag, at = _varint(data, at)
            kind, start = tag & 7, at
            if kind == 0:
                _, at = _varint(data, at)
            elif kind == 2:
                size, start = _varint(data, at)
                at = start + size
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                return []
            if at > len(data):
                return []
            found.append((tag >> 3, kind, data[start:at]))
    except IndexError:
        return []
    return found


def field(number: int, kind: int, value: bytes) -> bytes:
    size = _packed(len(value)) if kind == 2 else b""
    return _packed(number << 3 | kind) + size + value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _packed(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def gguf(data: bytes, rng: Random) -> bytes:
    """Mostly counts and sizes, which stand before what they count."""
    if rng.random() < 0.35:
        return bytewise(data, rng)
    at = (
        rng.choice((4, 8, 16))
        if rng.random() < 0.3
        else rng.randrange(min(len(data), 1500) // 4 + 1) * 4
    )
    fresh = struct.pack("<Q", rng.choice(odd.SIZES))[: rng.choice((4, 8))]
    return data[:at] + fresh + data[at + len(fresh) :]


def gzipped(inner: Mutator) -> Mutator:
    def change(data: bytes, rng: Random) -> bytes:
        how = rng.random()
        if how < 0.15:
            return bytewise(data, rng)
        try:
            whole = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return bytewise(data, rng)
        if how > 0.99:
            return _gzip_bomb(whole)
        packed = gzip.compress(inner(whole, rng)[:LARGEST], 1, mtime=0)
        return (
            packed if how < 0.9 else packed + rng.choice((packed, b"\x00" * 9, b"junk", packed[:7]))
        )

    return change


def _gzip_bomb(whole: bytes) -> bytes:
    line = whole.splitlines(keepends=True)[-1][:1000] if whole else b"0\n"
    block = line * max(1, (1 << 20) // max(1, len(line)))
    head = b"\x1f\x8b\x08" + bytes(7)
    return head + arrays.deflated(whole, block, arrays.BOMB_BYTES) + bytes(8)
