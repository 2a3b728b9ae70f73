"""What every source that reads files shares: finding them, naming their domain, and the number of experts."""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError
from prefetch.models.cards import load_card
from prefetch.sources.source import Source
from prefetch.trace.card import ModelCard
from prefetch.trace.writer import TraceWriter

log = logging.getLogger(__name__)
UNNAMED = "unknown model"  # what a card is called where neither the file nor model_card names one


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """`path` is a file, a folder, a list of them, or a glob."""

    path: str | list[str] | None = None
    n_experts: int | None = None  # where the file does not say
    model_card: str | None = None  # name in configs/model_card, or a YAML: lends names and sizes
    stack: Literal["decoder", "encoder"] = (
        "decoder"  # encoder | decoder: whose layers the file is about
    )
    suffixes: ClassVar[tuple[str, ...]] = ()  # which files of a folder are read

    def files(self) -> dict[str, Path]:
        return find_files(self.path, self.suffixes)

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        del settings["path"]
        if self.model_card is not None:
            settings["model_card"] = load_card(self.model_card).to_json()
        return settings

    @property
    def knows_experts(self) -> bool:
        """Was E given? Otherwise a file must be read twice, because the ids have to tell it."""
        return self.n_experts is not None or self.model_card is not None

    def experts(self, used_E: NDArray[np.bool_], writer: TraceWriter, where: str) -> int:
        """E for a file that does not say it: the setting, or what the ids imply if none is missing."""
        if self.n_experts is not None:
            return self.n_experts
        if self.model_card is not None:
            return load_card(self.model_card).n_experts
        if not used_E.any():
            raise FormatError(f"{where}: expected routing, found no expert at all")
        n_experts = int(np.flatnonzero(used_E)[-1]) + 1
        missing = np.flatnonzero(~used_E[:n_experts])
        if len(missing):
            raise FormatError(
                f"{where}: the file does not say how many experts there are; the largest id is {n_experts - 1} and "
                f"{len(missing)} smaller ids never occur ({missing[:5].tolist()}...): pass source.n_experts=..."
            )
        writer.note(f"n_experts={n_experts} is the largest id + 1: every smaller id occurs")
        return n_experts

    def card(
        self, name: str, *, n_experts: int, top_k: int, layer_numbers: tuple[int, ...], **known: Any
    ) -> ModelCard:
        """The card of what was read, with names and sizes lent by `model_card` where it was given."""
        if self.n_experts not in (None, n_experts):
            raise ConfigError(f"source.n_experts={self.n_experts}: the file has {n_experts}")
        stacks = (self.stack,) * len(layer_numbers)
        if self.model_card is None:
            return ModelCard(name, n_experts, top_k, layer_numbers, stacks, **known)
        lent = load_card(self.model_card)
        if lent.n_experts != n_experts:
            raise ConfigError(
                f"source.model_card={self.model_card}: it has {lent.n_experts} experts, the file has {n_experts}"
            )
        if (lent.top_k, lent.n_layers) != (top_k, len(layer_numbers)):
            log.warning(
                "model_card=%s has %d layers and top-%d, the file has %d and top-%d: names and sizes are the card's",
                self.model_card, lent.n_layers, lent.top_k, len(layer_numbers), top_k,
            )  # fmt: skip
        slots = _slots_of(lent, layer_numbers, self.stack, self.model_card)
        sizes = lent.expert_bytes_L
        read = {
            "top_k": top_k,
            "layer_numbers": tuple(lent.layer_numbers[slot] for slot in slots),
            "layer_stacks": stacks,
            "expert_bytes_L": sizes and tuple(sizes[slot] for slot in slots),
        }
        return dataclasses.replace(lent, **{**read, **known})  # what the file says wins


def _slots_of(card: ModelCard, numbers: tuple[int, ...], stack: str, name: str) -> list[int]:
    """Where the file's layers stand in the card: by the model's own numbers, or in order if it counts from 0."""
    own = [i for i, its_stack in enumerate(card.layer_stacks) if its_stack == stack]
    by_number = {card.layer_numbers[i]: i for i in own}
    if set(numbers) <= set(by_number):
        return [by_number[number] for number in numbers]
    if own and numbers == tuple(range(len(own))):
        return own
    raise ConfigError(
        f"source.model_card={name}: its {stack} has {_counted(sorted(by_number))}, the file "
        f"{_counted(numbers)}: give the card of the model that was recorded, or none"
        + (" (source.stack names the other one)" if len(set(card.layer_stacks)) > 1 else "")
    )


def _counted(numbers: Sequence[int]) -> str:
    first, last = (numbers[0], numbers[-1]) if numbers else (None, None)
    span = f"{first}" if first == last else f"{first} to {last}"
    return f"{len(numbers)} MoE layer{'' if len(numbers) == 1 else 's'} ({span})"


def domain_of(name: str) -> str:
    """What a file is about, where it does not say: its name without the folder and the suffixes."""
    return Path(name).name.split(".")[0]


def used_ids(blocks: Iterable[NDArray[Any]], where: str) -> NDArray[np.bool_]:
    """Which ids occur at all; negative ids mean no expert. `where` is what an error names."""
    used = np.zeros(2**16, bool)
    for ids in blocks:
        if ids.size and int(ids.max()) >= 2**16 - 1:
            raise FormatError(
                f"{where}: expert id {int(ids.max())} is out of range: at most 65534 experts"
            )
        used[ids[ids >= 0] if ids.dtype.kind == "i" else ids] = True
    return used


def find_files(path: str | list[str] | None, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Name -> file, in a fixed order; names are relative to what the user wrote, so a moved folder is the same."""
    if not path:
        raise ConfigError("source.path: must be given: a file, a folder, a list, or a glob")
    found: list[tuple[str, Path]] = []
    for text in [path] if isinstance(path, str) else path:
        try:
            found += _matches(text, suffixes)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"source.path={text[:200]}: no such file, folder or glob ({error})"
            ) from error
    real = [file.resolve() for _, file in found]
    if len(set(real)) < len(real):
        twice = Counter(real).most_common(1)[0][0]
        raise ConfigError(f"source.path: {twice} is named twice")
    if len({name for name, _ in found}) < len(
        found
    ):  # files of one name: tell them apart by their folders
        common = Path(os.path.commonpath(real))
        found = [
            (str(whole.relative_to(common)), file)
            for whole, (_, file) in zip(real, found, strict=True)
        ]
    return dict(found)


def _matches(text: str, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    root = Path(text).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        inside = sorted(
            p for p in root.rglob("*") if p.is_file() and p.name.endswith(suffixes or ("",))
        )
        if not inside:
            raise FormatError(f"{root}: the folder holds no file ending in {' or '.join(suffixes)}")
        return [(str(file.relative_to(root)), file) for file in inside]
    hits = sorted(map(Path, glob.glob(str(root), recursive=True)))  # noqa: PTH207 - may be absolute
    if not any(hit.is_file() for hit in hits):
        raise ConfigError(f"source.path={text}: no such file, folder or glob")
    return [(hit.name, hit) for hit in hits if hit.is_file()]


def whole_ids(ids: NDArray[Any], axes: str) -> NDArray[np.int32]:
    """Expert ids as a file has them, as int32: no fraction and no overflow becomes another expert."""
    if ids.ndim != len(axes.split(", ")) or ids.dtype.kind not in "iu":
        raise FormatError(
            f"expected expert ids as whole numbers [{axes}], found {ids.dtype} {list(ids.shape)}"
        )
    if ids.size and not -(2**31) <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise FormatError(f"expert id {int(ids.max())} is out of range")
    return ids.astype(np.int32)


class Requests:
    """The runs of equal names in a file's request column, numbered from 0, and the rows within each counted.

    Blocks are handed over in order. A name that comes back later is an error: its rows stand apart.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._last: Any = None
        self._rows = 0  # of the run that is open

    def number(self, names_T: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(request_T, position_T) of the next block."""
        if names_T.dtype.kind == "f":
            raise FormatError(
                "request: expected whole numbers or names, found fractions (missing values?)"
            )
        rows = np.arange(len(names_T))
        starts = np.flatnonzero(names_T[1:] != names_T[:-1]) + 1
        if self._rows == 0 or names_T[0] != self._last:
            starts, self._rows = np.append(0, starts), 0
        before = len(self._seen) - 1
        for name in names_T[starts].tolist():
            if name in self._seen:
                raise FormatError(
                    f"request {name!r}: its rows do not stand together; sort the file by request and position"
                )
            self._seen.add(name)
        run_T = np.searchsorted(starts, rows, side="right")
        first_T = np.append(-self._rows, starts)[run_T]
        self._last, self._rows = names_T[-1], int(rows[-1] - first_T[-1]) + 1
        return (before + run_T).astype(np.int32), rows - first_T
