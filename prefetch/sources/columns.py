"""Files of named arrays (npz, npy, safetensors, Parquet) as columns, handed out in blocks of rows in constant memory.

It knows no meaning of a column. T rows; a column is [T, ...].
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch import zipped
from prefetch.errors import FormatError, reading
from prefetch.trace.packed import check_packed, is_text, text_bytes

MOST_TEXT = 256 << 20  # bytes of the names of a block's rows, each as long as it is
ONLY = "expert_ids"  # what the one array of a .npy file is called

Block = dict[str, NDArray[Any]]


class Columns:
    """One file. `names` says what it holds; `blocks` streams the rows, `whole` reads what has no row axis."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: tuple[str, ...] = ()

    def whole(self, name: str) -> NDArray[Any]:
        raise NotImplementedError

    def blocks(self, names: list[str], rows: int) -> Iterator[Block]:
        raise NotImplementedError

    def _n_rows(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """The rows that all these arrays have."""
        rows = {shape[0] if shape else None for shape in shapes.values()}
        if len(rows) != 1 or None in rows:
            raise FormatError(
                f"{self.path}: expected as many rows in every array, got shapes {shapes}"
            )
        return rows.pop() or 0


class Memory(Columns):
    """Arrays that are mapped rather than read: .npy and safetensors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.arrays: dict[str, Any] = self._npy() if path.suffix == ".npy" else self._safetensors()
        self.names = tuple(self.arrays)

    def _npy(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            zipped.Header.of(file, self.path.stat().st_size)  # what numpy maps unchecked
        return {ONLY: np.load(self.path, mmap_mode="r", allow_pickle=False)}

    def _safetensors(self) -> dict[str, Any]:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:  # numpy has no bfloat16
            return {name: _Slice(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118

    def whole(self, name: str) -> NDArray[Any]:
        with reading(f"{self.path}, array {name}", "an array"):
            return np.asarray(self.arrays[name][:])

    def blocks(self, names: list[str], rows: int) -> Iterator[Block]:
        total = self._n_rows({name: tuple(self.arrays[name].shape) for name in names})
        for start in range(0, total, rows):
            with reading(self.path, "rows of its arrays"):
                block = {
                    name: np.asarray(self.arrays[name][start : start + rows]) for name in names
                }
            yield block


class _Slice:
    """A tensor of a safetensors file, read piece by piece."""

    def __init__(self, part: Any) -> None:
        self.part, self.shape = part, tuple(part.get_shape())

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        tensor = self.part[rows]
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class Npz(Columns):
    """Members of the zip are inflated as they are read, never whole, and never a zip bomb."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.names = zipped.names_in(path)

    def whole(self, name: str) -> NDArray[Any]:
        return zipped.whole(self.path, name)

    def blocks(self, names: list[str], rows: int) -> Iterator[Block]:
        members = {}
        with ExitStack() as opened:
            archive = opened.enter_context(zipfile.ZipFile(self.path))
            for name in names:
                with reading(f"{self.path}, array {name}", "an array"):
                    members[name] = zipped.Member(archive, name, opened)
            total = self._n_rows({name: member.shape for name, member in members.items()})
            for start in range(0, total, rows):
                with reading(self.path, "rows of its arrays"):
                    n = min(rows, total - start)
                    block = {name: member.take(n) for name, member in members.items()}
                yield block


class Parquet(Columns):
    """Lists of one length, nested or not, become the further axes of an array."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        super().__init__(path)
        self.names = tuple(pq.read_schema(path).names)

    def whole(self, name: str) -> NDArray[Any]:
        return np.concatenate([block[name] for block in self.blocks([name], 1 << 16)])

    def blocks(self, names: list[str], rows: int) -> Iterator[Block]:
        import pyarrow.parquet as pq

        waiting: list[
            Block
        ] = []  # Arrow may hand out fewer rows than asked, at the end of a row group
        with reading(self.path, "columns of Parquet"):
            texts = texts_of(pq.read_schema(self.path), names)
        with pq.ParquetFile(self.path, read_dictionary=texts) as file:
            with reading(self.path, "rows of Parquet"):
                check_packed(file.metadata, self.path)
            batches = file.iter_batches(batch_size=rows, columns=names)
            while True:
                with reading(self.path, "rows of Parquet"):
                    batch = next(batches, None)
                    if batch is not None:
                        waiting.append({name: dense(batch.column(name), name) for name in names})
                    n_rows = sum(len(part[names[0]]) for part in waiting)
                    if batch is not None and n_rows < rows:
                        continue
                    if not n_rows:
                        return
                    block = {
                        name: np.concatenate([part[name] for part in waiting]) for name in names
                    }
                yield {name: array[:rows] for name, array in block.items()}
                waiting = [{name: array[rows:] for name, array in block.items()}]


def texts_of(schema: Any, names: list[str]) -> list[str]:
    """Columns of names, to be read as those that there are and who has which: not a long one for every row."""
    import pyarrow as pa

    texts = []
    for name in names:
        kind = inner = schema.field(name).type
        while pa.types.is_nested(inner) and inner.num_fields == 1:
            inner = inner.field(0).type
        if is_text(inner):
            texts.append(name)
            if inner is not kind:
                raise FormatError(f"column {name}: expected lists of numbers, found {kind}")
    return texts


def _check_texts(column: Any, name: str) -> None:
    """A few kilobytes can say one long name a million times."""
    if not is_text(column.type):
        return
    n_bytes = text_bytes(column)
    if n_bytes > MOST_TEXT:
        raise FormatError(
            f"column {name}: {len(column):,} rows hold {n_bytes:,} bytes of text, more than {MOST_TEXT:,}: refused as "
            "a bomb; if it is none, give requests and domains shorter names, or numbers"
        )


def dense(column: Any, name: str) -> NDArray[Any]:
    """A (nested) list column of Arrow as an array [T, ...]: every list must be as long as the first."""
    import pyarrow as pa

    shape = [len(column)]
    while pa.types.is_nested(column.type) or pa.types.is_dictionary(column.type):
        if pa.types.is_dictionary(column.type):
            _check_texts(column, name)
            column = column.dictionary_decode()
            continue
        if column.null_count or pa.types.is_struct(column.type) or pa.types.is_map(column.type):
            raise FormatError(f"column {name}: expected lists without nulls, found {column.type}")
        inner = column.flatten()
        width = len(inner) // len(column) if len(column) else 0
        if not pa.types.is_fixed_size_list(column.type):
            widths = column.value_lengths().to_numpy()
            if (widths != width).any():
                row = int((widths != (widths[0] if len(widths) else 0)).argmax())
                raise FormatError(
                    f"column {name}: expected lists of one length, row {row} of {len(widths)} holds {widths[row]}, "
                    f"row 0 holds {widths[0]}"
                )
        column = inner
        shape.append(width)
    if column.null_count:
        raise FormatError(f"column {name}: {column.null_count} values are null")
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(shape)


def open_columns(path: Path) -> Columns:
    """The reader that belongs to the file's suffix."""
    kinds = {".npz": Npz, ".npy": Memory, ".safetensors": Memory, ".parquet": Parquet}
    if path.suffix not in kinds:
        raise FormatError(f"{path}: expected a file ending in {' or '.join(kinds)}")
    with reading(path, f"a {path.suffix} file"):
        if not path.stat().st_size:
            raise FormatError(f"{path}: the file is empty")
        return kinds[path.suffix](path)
