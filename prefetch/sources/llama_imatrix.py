"""Expert counts out of llama.cpp's importance matrices (GGUF): `blk.N.ffn_*_exps.weight.counts`.

counts[e] is the number of tokens that were routed to e. There is no order, so nothing but counts can come of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.optional import require
from prefetch.sources.files import UNNAMED, FileSource
from prefetch.sources.gguf_layout import check_layout
from prefetch.trace.counts import ExpertCounts
from prefetch.trace.provenance import Provenance

NAME = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight\.counts$")
EXACT = 2**24  # counts are float32: above this they are rounded


@dataclass(frozen=True, kw_only=True)
class LlamaImatrix(FileSource):
    """The gate, up and down tensors of a layer repeat the same counts: they must agree, and one is used."""

    top_k: int | None = None
    suffixes: ClassVar[tuple[str, ...]] = (".gguf",)
    gives: ClassVar[str] = "counts"
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "gguf")

    def count(self, provenance: Provenance) -> ExpertCounts:
        if self.top_k is None:
            raise ConfigError(
                "source.top_k: must be given, since an importance matrix does not say it"
            )
        path = self._one_file()
        by_layer = read_counts(path)
        layers = tuple(sorted(by_layer))
        sizes = {len(counts) for counts in by_layer.values()}
        if len(sizes) > 1:
            raise FormatError(
                f"{path}: expected the same number of experts in every layer, found {sizes}"
            )
        card = self.card(UNNAMED, n_experts=sizes.pop(), top_k=self.top_k, layer_numbers=layers)
        with reading(path, "counts of experts"):
            return ExpertCounts(card, np.stack([by_layer[layer] for layer in layers]), provenance)

    def _one_file(self) -> Path:
        files = list(self.files().values())
        if len(files) != 1:
            raise ConfigError(f"source.path: expected one file of counts, found {len(files)}")
        return files[0]


def read_counts(path: Path) -> dict[int, NDArray[np.int64]]:
    """Layer -> counts of its experts."""
    found: dict[int, NDArray[np.int64]] = {}
    for name, values in _tensors(path):
        match = NAME.match(name)
        assert match is not None
        counts = values.ravel()
        if (
            not np.isfinite(counts).all()
            or (counts < 0).any()
            or (counts != np.floor(counts)).any()
        ):
            raise FormatError(
                f"{path}, tensor {name}: expected counts, found {counts[:6].tolist()}"
            )
        if (counts >= EXACT).any():
            raise FormatError(
                f"{path}, tensor {name}: a count of {counts.max():.0f} is beyond float32's exact range"
            )
        layer = int(match.group(1))
        if layer in found and not np.array_equal(found[layer], counts):
            raise FormatError(
                f"{path}, tensor {name}: its counts differ from those of the layer's other tensors"
            )
        found[layer] = counts.astype(np.int64)
    if not found:
        raise FormatError(
            f"{path}: expected tensors blk.N.ffn_*_exps.weight.counts, found none: no MoE model?"
        )
    return found


def _tensors(path: Path) -> list[tuple[str, NDArray[Any]]]:
    """Those of counts, by their names; the others are not held."""
    gguf = require("gguf", "GGUFReader", asked_by="reading GGUF")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FormatError(
                f"{path}: expected a GGUF file; the older .dat importance matrices hold no counts per expert"
            )
    with reading(path, "a whole GGUF file"):
        check_layout(path)
        reader = gguf.GGUFReader(path)
        kind = reader.get_field("general.type")
        if kind is None or kind.contents() != "imatrix":
            raise FormatError(
                f"{path}: expected general.type=imatrix; this GGUF file is something else"
            )
        return [
            (tensor.name, np.array(tensor.data, np.float64))
            for tensor in reader.tensors
            if NAME.match(tensor.name) and tensor.data.size != 1
        ]
