"""Per-layer expert counts that somebody kept instead of a trace: JSON, dense or sparse, or npz. No order comes of it.

JSON: specMoE's `expert_usage_by_layer` and `statistics` {layer: {expert: count}}, Expertflow's `all_workloads` and
`by_family` {layer: {frequency: {expert: count}}}; npz: `counts` [L, E]. Several files add up. L layers, E experts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.models.cards import load_card
from prefetch.sources.columns import open_columns
from prefetch.sources.files import UNNAMED, FileSource
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.provenance import Provenance

SHAPES = ("expert_usage_by_layer", "statistics", "all_workloads", "counts")
ARRAYS = ("counts", "expert_counts", "usage", "frequency")


@dataclass(frozen=True)
class Read:
    """One file: layer -> expert -> count, and what else it says."""

    path: Path
    layers: dict[int, dict[int, int]]
    n_experts: int | None = None
    top_k: int | None = None


@dataclass(frozen=True, kw_only=True)
class Counts(FileSource):
    """`top_k` choices per token make up the counts."""

    top_k: int | None = None
    family: str | None = None
    gives: ClassVar[str] = "counts"
    suffixes: ClassVar[tuple[str, ...]] = (".json", ".npz")

    def count(self, provenance: Provenance) -> ExpertCounts:
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"source.top_k: expected at least 1, got {self.top_k}")
        files = [self._read(path) for path in self.files().values()]
        notes: list[str] = []
        n_experts = self._n_experts(files, notes)
        counts_LE = sum(_table(read, files[0], n_experts) for read in files)
        if len({read.top_k for read in files}) > 1:
            raise FormatError(f"{files[0].path}: and the other files differ in choices per token")
        top_k = self.top_k or files[0].top_k
        if top_k is None:
            top_k = 1
            notes.append("top_k=1: the file does not say it; pass source.top_k=... if it is more")
        where = ", ".join(str(read.path) for read in files)
        with reading(where, "counts"):
            sums_L = np.asarray(counts_LE).sum(axis=1)
            if (uneven := sums_L % top_k != 0).any():
                layer = list(files[0].layers)[int(uneven.argmax())]
                raise FormatError(
                    f"layer {layer}: {sums_L[uneven.argmax()]} choices are no multiple of top_k={top_k}"
                )
            if len(set(sums_L.tolist())) > 1:
                notes.append(
                    "layers hold unequal numbers of choices: they did not all see every token"
                )
            card = self.card(
                UNNAMED, n_experts=n_experts, top_k=top_k, layer_numbers=tuple(files[0].layers)
            )
            told = dataclasses.replace(provenance, notes=(*provenance.notes, *notes))
            return ExpertCounts(card, np.asarray(counts_LE, np.int64), told)

    def _n_experts(self, files: list[Read], notes: list[str]) -> int:
        if self.n_experts is not None and all(read.n_experts is None for read in files):
            return self.n_experts
        if self.model_card is not None:
            return load_card(self.model_card).n_experts
        if said := {read.n_experts for read in files if read.n_experts is not None}:
            if len(said) > 1:
                raise FormatError(
                    f"{files[0].path}: and the other files differ in experts: {sorted(said)}"
                )
            return said.pop()
        named = {expert for read in files for layer in read.layers.values() for expert in layer}
        n_experts = max(named, default=-1) + 1
        if len(named) != n_experts or not named:
            raise FormatError(
                f"{files[0].path}: does not say how many experts there are, and {n_experts - len(named)} ids below "
                f"{n_experts} never occur: pass source.n_experts=..."
            )
        notes.append(f"n_experts={n_experts} is the largest id + 1: every smaller id occurs")
        return n_experts

    def _read(self, path: Path) -> Read:
        if path.suffix == ".npz":
            with reading(path, "counts [layer, expert]"):
                return _read_npz(path)
        with reading(path, "JSON with expert counts"):
            about = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(about, dict):
                raise FormatError(f"{path}: expected a JSON object, found {type(about).__name__}")
            if self.family is not None:
                families = about.get("by_family", {})
                if self.family not in families:
                    raise ConfigError(
                        f"source.family={self.family}: {path} has {sorted(families) or 'no families'}"
                    )
                return _layers_of(path, families[self.family], about)
            for shape in SHAPES:
                if shape in about:
                    return _layers_of(path, about[shape], about)
            raise FormatError(
                f"{path}: expected counts under {', '.join(SHAPES)}, found {sorted(about)[:12]}"
                + "; layer_statistics are summaries, from which counts cannot be had"
                * ("layer_statistics" in about)
            )


def _layers_of(path: Path, layers: Any, about: Mapping[str, Any]) -> Read:
    found: dict[int, dict[int, int]] = {}
    top_ks = set()
    for key, value in layers.items() if isinstance(layers, dict) else enumerate(layers):
        counts = value.get("frequency", value) if isinstance(value, dict) else value
        pairs = enumerate(counts) if isinstance(counts, list) else counts.items()
        found[int(key)] = {int(expert): _whole(n, key, expert) for expert, n in pairs}
        if isinstance(value, dict) and "event_count" in value:
            top_ks.add(value["expert_demand_count"] / value["event_count"])
    if not found:
        raise FormatError(f"{path}: expected at least one layer")
    if len(top_ks) > 1 or any(k != int(k) for k in top_ks):
        raise FormatError(
            f"{path}: choices per token differ or are no whole number: {sorted(top_ks)}"
        )
    top_k = int(top_ks.pop()) if top_ks else None
    n_experts = about.get("num_experts")
    if n_experts is not None and (type(n_experts) is not int or not 1 <= n_experts < 2**16):
        raise FormatError(
            f"{path}: num_experts must be a whole number from 1 to 65535, got {n_experts!r}"
        )
    return Read(path, dict(sorted(found.items())), n_experts, top_k)


def _whole(n: Any, layer: Any, expert: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 <= n < 2**53 or int(n) != n:
        raise FormatError(f"layer {layer}, expert {expert}: expected a whole count, got {n!r}")
    return int(n)


def _read_npz(path: Path) -> Read:
    columns = open_columns(path)
    name = next((name for name in ARRAYS if name in columns.names), None)
    if name is None:
        raise FormatError(f"{path}: expected an array {' or '.join(ARRAYS)}, found {columns.names}")
    counts_LE = columns.whole(name)
    layers: NDArray[Any] = np.arange(len(counts_LE))
    for alias in ("layer_ids", "layers", "layer_numbers"):
        if alias in columns.names:
            layers = columns.whole(alias)
    if (
        counts_LE.ndim != 2
        or counts_LE.dtype.kind not in "iu"
        or layers.shape != counts_LE.shape[:1]
        or layers.dtype.kind not in "iu"
    ):
        raise FormatError(
            f"{path}: expected whole numbers [layer, expert] and as many layer numbers, found {counts_LE.dtype} "
            f"{list(counts_LE.shape)} and {list(layers.shape)}"
        )
    table = {
        int(layer): {e: _whole(int(n), layer, e) for e, n in enumerate(row)}
        for layer, row in zip(layers, counts_LE, strict=True)
    }
    return Read(path, table, counts_LE.shape[1])


def _table(read: Read, first: Read, n_experts: int) -> NDArray[np.int64]:
    """[L, E]; every file must have the layers of the first."""
    if list(read.layers) != list(first.layers):
        raise FormatError(
            f"{read.path}: expected layers {list(first.layers)} as in {first.path.name}, got {list(read.layers)}"
        )
    counts_LE = np.zeros((len(read.layers), n_experts), np.int64)
    for row, (layer, counts) in enumerate(read.layers.items()):
        if counts and min(counts) < 0:
            raise FormatError(
                f"{read.path}, layer {layer}: an expert cannot have the number {min(counts)}"
            )
        if counts and max(counts) >= n_experts:
            raise FormatError(
                f"{read.path}, layer {layer}: expert {max(counts)} is out of range for {n_experts} experts; if the "
                "model has more, pass source.n_experts=..."
            )
        counts_LE[row, list(counts)] = list(counts.values())
    return counts_LE
