"""route_trace v1: a preamble with the sizes of every layer, then one CSV row per (token, layer, choice).

Columns are read by name, because newer files append more. What the recording engine's own cache held goes into the
facts of the provenance, to check a simulator against; the trace itself is routing.
Format: Helldez/BigMoeOnEdge at 2d4f2b1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading
from prefetch.sources.files import FileSource, Requests, domain_of
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import PHASES, PREFILL, trace_of
from prefetch.trace.writer import TraceWriter

FIRST_LINE = "# route_trace v1"
REQUIRED = ("turn", "phase", "step", "layer", "slot", "expert")
OPTIONAL = ("weight", "residency", "expert_bytes")
HIT = 1  # residency: 0 miss, 1 hit, 2 first touch of a speculative prefetch
BLOCK_BYTES = 8 << 20

Turn = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class RouteCsv(FileSource):
    """A turn is a request; `step` is the position in the context."""

    suffixes: ClassVar[tuple[str, ...]] = (".csv",)
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "pyarrow")

    def record(self, writer: TraceWriter, upstream: Mapping[str, Path]) -> None:
        totals: dict[str, int] = {}
        for name, path in self.files().items():
            writer.file(str(path))
            with reading(path, "a route_trace v1 file"):
                n_lines, about, columns = read_preamble(path)
                card = self._card(about)
            writer.begin(card)
            requests = Requests()
            for turn in turns(path, n_lines, columns):
                with reading(path, "rows of route_trace v1"):
                    request_T, arrays = tokens_of(turn, card, requests)
                    if missing := int((arrays["ids_TLK"][:, -1] < 0).all(axis=1).sum()):
                        writer.note(
                            f"{missing} prompt tokens of a turn have no routing in the last layer: the engine runs it "
                            "for output tokens only"
                        )
                    for key, n in residency_counts(turn).items():
                        totals[key] = totals.get(key, 0) + n
                    trace = trace_of(card, request_T=request_T, domain=domain_of(name), **arrays)
                writer.append(trace)
        _add_facts(writer, totals)

    def _card(self, about: dict[str, Any]) -> ModelCard:
        layers = about["layers"]
        expert_bytes = tuple(layer["expert_bytes"] for layer in layers.values())
        card = self.card(
            PurePosixPath(about["model"]).name,
            n_experts=int(about["n_expert"]),
            top_k=int(about["n_expert_used"]),
            layer_numbers=tuple(layers),
            expert_bytes_L=expert_bytes,
            expert_precision="as in the recorded file",
            dense_bytes=sum(layer["dense_bytes"] for layer in layers.values()),
        )
        if len(layers) > int(about["n_layer"]):
            raise FormatError(f"n_layer={about['n_layer']}, but {len(layers)} layers are described")
        return card


def read_preamble(path: Path) -> tuple[int, dict[str, Any], list[str]]:
    """Lines of the preamble, what it says (`layers`: number -> sizes), and the names of the columns."""
    about: dict[str, Any] = {"layers": {}}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if not line.startswith("#"):
                break
            if number == 0 and line.rstrip() != FIRST_LINE:
                raise FormatError(
                    f"{path}, line 1: expected {FIRST_LINE!r}, got {line.rstrip()[:80]!r}"
                )
            pairs = dict(re.findall(r"(\w+)=(\S+)", line))
            if "layer" in pairs:
                about["layers"][int(pairs.pop("layer"))] = {k: int(v) for k, v in pairs.items()}
            else:
                about |= pairs
        else:
            raise FormatError(
                f"{path}: expected a preamble, a header and rows; the file ends early"
            )
    columns = line.strip().split(",")
    needed = {"model", "n_layer", "n_expert", "n_expert_used"} - set(about)
    if number == 0 or needed or not about["layers"] or set(REQUIRED) - set(columns):
        raise FormatError(
            f"{path}: expected {FIRST_LINE!r}, lines with model, n_layer, n_expert, n_expert_used and one per layer, "
            f"then a header with {', '.join(REQUIRED)}; missing {sorted(needed)}, header {line.strip()[:120]!r}"
        )
    about["layers"] = dict(sorted(about["layers"].items()))
    return number, about, columns


def turns(path: Path, n_lines: int, columns: list[str]) -> Iterator[Turn]:
    """The rows of one turn after another; only a turn is held at once."""
    parts: list[Turn] = []
    for block in _blocks(path, n_lines, columns):
        turn = block["turn"]
        cuts = np.flatnonzero(np.diff(turn, prepend=parts[-1]["turn"][-1:] if parts else turn[:1]))
        for start, stop in itertools.pairwise([-1, *cuts.tolist(), len(turn)]):
            if start >= 0:  # a turn begins here
                yield _joined(parts)
                parts = []
            if stop > max(start, 0):
                parts.append({name: column[max(start, 0) : stop] for name, column in block.items()})
    if parts:
        yield _joined(parts)


def _blocks(path: Path, n_lines: int, columns: list[str]) -> Iterator[Turn]:
    """Rows as columns, as they come."""
    import pyarrow as pa
    from pyarrow import csv

    kinds = {name: pa.int32() for name in REQUIRED} | {"weight": pa.float32()}
    kinds |= {"residency": pa.int8(), "expert_bytes": pa.int64()}
    names = [name for name in (*REQUIRED, *OPTIONAL) if name in columns]
    with reading(path, "rows of route_trace v1"):
        reader = csv.open_csv(
            path,
            read_options=csv.ReadOptions(skip_rows=n_lines, block_size=BLOCK_BYTES),
            convert_options=csv.ConvertOptions(include_columns=names, column_types=kinds),
        )
    while True:
        with reading(path, "rows of route_trace v1"):
            batch = next(iter(reader), None)
            if batch is None:
                return
            if nulls := [n for n in names if n != "weight" and batch.column(n).null_count]:
                raise FormatError(f"{path}: column {nulls[0]} has empty fields")
            block = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in names}
        yield block


def _joined(parts: list[Turn]) -> Turn:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def tokens_of(
    turn: Turn, card: ModelCard, requests: Requests
) -> tuple[NDArray[np.int32], dict[str, NDArray[Any]]]:
    """The rows of a turn as arrays of tokens; a layer that did not see a token holds no expert there."""
    step_T, token_N = np.unique(turn["step"], return_inverse=True)
    at = (token_N, _layer_slots(turn, card), turn["slot"])
    shape = (len(step_T), card.n_layers, card.top_k)
    ids_TLK, weights_TLK = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    ids_TLK[at] = turn["expert"]
    phase_T = np.zeros(len(step_T), np.int32)
    phase_T[token_N] = turn["phase"]
    if (phase_T[token_N] != turn["phase"]).any() or not np.isin(phase_T, range(len(PHASES))).all():
        raise FormatError(
            "phase: expected 0 (prefill) or 1 (decode), the same in all rows of a step"
        )
    _check_complete(ids_TLK, phase_T, len(token_N), step_T, card)
    request_T, _ = requests.number(np.full(len(step_T), turn["turn"][0]))
    arrays = {"ids_TLK": ids_TLK, "position_T": step_T, "phase_T": phase_T}
    if "weight" in turn:
        weights_TLK[at] = turn["weight"]
        arrays["weights_TLK"] = weights_TLK
    return request_T, arrays


def _layer_slots(turn: Turn, card: ModelCard) -> NDArray[np.int64]:
    """Where every row's layer stands on the L axis; rows that point outside the arrays are refused here."""
    layers = np.array(card.layer_numbers)
    layer_N = np.searchsorted(layers, turn["layer"]).clip(max=len(layers) - 1)
    if (bad := layers[layer_N] != turn["layer"]).any():
        raise FormatError(f"layer {turn['layer'][bad.argmax()]}: the preamble does not describe it")
    slot_N, expert_N = turn["slot"], turn["expert"]
    if (bad := (slot_N < 0) | (slot_N >= card.top_k) | (expert_N < 0)).any():
        row = int(bad.argmax())
        raise FormatError(
            f"step {turn['step'][row]}: expected slots from 0 to {card.top_k - 1} and experts from 0, got slot "
            f"{slot_N[row]}, expert {expert_N[row]}"
        )
    return layer_N


def _check_complete(
    ids_TLK: NDArray[Any], phase_T: NDArray[Any], n_rows: int, step_T: NDArray[Any], card: ModelCard
) -> None:
    """All k choices; or none in prefill's last layer, which llama.cpp runs for output tokens alone."""
    chosen_TL = (ids_TLK >= 0).sum(axis=2)
    if int(chosen_TL.sum()) != n_rows:
        raise FormatError(
            f"steps {step_T[0]} to {step_T[-1]}: {n_rows - int(chosen_TL.sum())} rows repeat a "
            "(step, layer, slot) of the same turn"
        )
    partial = chosen_TL != card.top_k
    partial[:, -1] &= (chosen_TL[:, -1] != 0) | (phase_T != PREFILL)
    if partial.any():
        token, layer = (int(x) for x in np.argwhere(partial)[0])
        raise FormatError(
            f"step {step_T[token]}, layer {card.layer_numbers[layer]}: expected {card.top_k} choices, got "
            f"{chosen_TL[token, layer]}; the file was cut off, or rows were dropped"
        )


def residency_counts(turn: Turn) -> dict[str, int]:
    """What the engine's cache was asked and answered. In prefill an expert is looked up once per layer and pass."""
    if "residency" not in turn:
        return {}
    is_decode = turn["phase"] != PREFILL
    is_hit = turn["residency"] == HIT
    expert_N = turn["layer"].astype(np.int64) << 32 | turn["expert"]
    counts = {
        "prefill_lookups": len(np.unique(expert_N[~is_decode])),
        "prefill_hits": len(np.unique(expert_N[~is_decode & is_hit])),
        "decode_lookups": int(is_decode.sum()),
        "decode_hits": int((is_decode & is_hit).sum()),
    }
    if "expert_bytes" in turn:
        counts["expert_bytes_read"] = int(turn["expert_bytes"].sum())
    return counts


def _add_facts(writer: TraceWriter, totals: dict[str, int]) -> None:
    for name, n in totals.items():
        writer.fact(f"recorded_{name}", n)
    lookups = totals.get("prefill_lookups", 0) + totals.get("decode_lookups", 0)
    if lookups:
        hits = totals["prefill_hits"] + totals["decode_hits"]
        writer.fact("recorded_hit_rate", hits / lookups)
