"""What a trace is, without reading its choices: rows by phase and domain, request lengths, bytes, and what it lacks.

It knows no stage and no predictor: what they need they say themselves. R requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import FormatError
from prefetch.trace.beside import names_beside
from prefetch.trace.parquet import WIDE, TraceReader
from prefetch.trace.routing import DECODE, NO_TOKEN, PHASES, PREFILL

UNKNOWN = "(no domain)"
CARD_FIELDS = (
    "hidden_size",
    "score_function",
    "expert_bytes_L",
    "dense_bytes",
    "kv_bytes_per_token",
)


@dataclass(frozen=True)
class Description:
    """Counts; `rows_DP[d, p]` are the rows of domain d in phase p, the last domain is for rows without one."""

    domains: tuple[str, ...]
    rows_DP: NDArray[np.int64]
    requests_D: NDArray[np.int64]  # by their first row
    lengths_R: NDArray[np.int64]
    n_not_executed: int
    n_without_token: int
    bytes_of: dict[str, int]  # file stem -> bytes on disk
    lacks: tuple[str, ...]

    @property
    def n_rows(self) -> int:
        return int(self.rows_DP.sum())

    def table(self) -> list[dict[str, Any]]:
        """One row per domain that occurs, and one for all."""
        rows = [
            _row(name, int(self.requests_D[d]), self.rows_DP[d])
            for d, name in enumerate(self.domains)
            if self.rows_DP[d].any()
        ]
        return [*rows, _row("all", len(self.lengths_R), self.rows_DP.sum(axis=0))]

    def metrics(self) -> dict[str, float]:
        shortest, median, longest = np.quantile(self.lengths_R, [0, 0.5, 1], method="lower")
        return {
            "tokens": self.n_rows,
            "requests": len(self.lengths_R),
            "prefill_tokens": int(self.rows_DP[:, PREFILL].sum()),
            "decode_tokens": int(self.rows_DP[:, DECODE].sum()),
            "not_executed_tokens": self.n_not_executed,
            "tokens_without_id": self.n_without_token,
            "domains": int((self.rows_DP[:-1].sum(axis=1) > 0).sum()),
            "shortest_request_tokens": int(shortest),
            "median_request_tokens": int(median),
            "longest_request_tokens": int(longest),
            "bytes": sum(self.bytes_of.values()),
        }


def _row(name: str, requests: int, rows_P: NDArray[np.int64]) -> dict[str, Any]:
    phases = {f"{phase}_tokens": int(rows_P[i]) for i, phase in enumerate(PHASES)}
    return {"domain": name, "requests": requests, **phases, "tokens": int(rows_P.sum())}


class _Tally:
    """Counts of the row groups as they pass by."""

    def __init__(self, n_domains: int) -> None:
        self.rows_DP = np.zeros((n_domains + 1, len(PHASES)), np.int64)
        self.requests_D = np.zeros(n_domains + 1, np.int64)
        self.lengths: list[NDArray[np.int64]] = []
        self.n_not_executed = self.n_without_token = 0
        self._last = -1  # the request that may go on

    def add(self, small: Mapping[str, NDArray[Any]]) -> None:
        request_T, domain_T = small["request_T"], small["domain_T"]
        np.add.at(self.rows_DP, (domain_T, small["phase_T"]), 1)  # -1 is the last
        starts = np.flatnonzero(np.diff(request_T, prepend=self._last))
        np.add.at(self.requests_D, domain_T[starts], 1)
        head = int(starts[0]) if len(starts) else len(request_T)
        if head:
            self.lengths[-1][-1] += head
        if len(starts):
            self.lengths.append(np.diff(np.append(starts, len(request_T))))
        self._last = int(request_T[-1])
        self.n_not_executed += int((~small["executed_T"]).sum())
        self.n_without_token += int((small["token_T"] == NO_TOKEN).sum())


def describe(trace: TraceReader | Path | str) -> Description:
    """One pass over the small columns."""
    reader = trace if isinstance(trace, TraceReader) else TraceReader(trace)
    tally = _Tally(len(reader.domains))
    for small in reader.small():
        tally.add(small)
    if not tally.lengths:
        raise FormatError(f"{reader.folder}: the trace has no rows")
    return Description(
        domains=(*reader.domains, UNKNOWN),
        rows_DP=tally.rows_DP,
        requests_D=tally.requests_D,
        lengths_R=np.concatenate(tally.lengths),
        n_not_executed=tally.n_not_executed,
        n_without_token=tally.n_without_token,
        bytes_of=bytes_of(reader.folder),
        lacks=lacks(reader, tally.n_without_token),
    )


def bytes_of(folder: Path) -> dict[str, int]:
    """File stem -> bytes on disk, shards added up."""
    found: dict[str, int] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        stem = path.stem.rpartition("-")[0] if path.suffix == ".parquet" else path.name
        found[stem] = found.get(stem, 0) + path.stat().st_size
    return found


def lacks(reader: TraceReader, n_without_token: int) -> tuple[str, ...]:
    """What a trace could hold and this one does not."""
    missing = [name for name in WIDE if name not in reader.columns and name != "score_ids"]
    missing += ["router_weights"] if "router_weights" not in names_beside(reader) else []
    missing += ["domains"] if not reader.domains else []
    missing += ["token ids"] if n_without_token == reader.n_tokens else []
    return (*missing, *(f"card: {n}" for n in CARD_FIELDS if getattr(reader.card, n) is None))
