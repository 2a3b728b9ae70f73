"""What a guess is: `predictions.json` and Parquet shards aligned with a trace's rows.

`ids_THLP[t, h, l, p]` is the p-th best guess for target layer l of token t, made `horizons[h]` layers earlier. Any
tool can write this file; the simulator reads nothing else of a predictor. It knows no predictor.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prefetch.errors import FormatError, reading
from prefetch.trace.columns import binary, unbinary
from prefetch.trace.packed import check_packed
from prefetch.trace.parquet import GROUP_BYTES, ShardWriter
from prefetch.trace.routing import IdArray, id_dtype, no_expert
from prefetch.trace.version import read_json

SCHEMA = "prefetch.predictions/1"
# guesses that are alike from token to token shrink, those of `popularity` to 0.005 of their bytes, of `previous_token`
# to 0.38, of `markov` to 0.96, and are read as fast; zstd halves the rate of writing for a quarter of `markov`
# (drawn routing, two shared cores, November 2026)
CODEC = "lz4"
CAUSALITIES = ("decode", "prefill", "cheats")
TIMED = (
    "online",
    "block",
    "declared",
)  # one event at a time; its share of a block; as its maker says


@dataclass(frozen=True)
class PredictionsCard:
    """What must be known of guesses before they may be replayed."""

    trace: str  # key of the trace whose rows these are
    predictor: str
    n_experts: int
    n_layers: int
    width: int
    horizons: tuple[int, ...]  # layers ahead
    causality: str  # decode: all earlier tokens known; prefill: only up to the same layer; cheats
    score: str  # what a score means: probability, logit, count, rank
    requests: tuple[int, ...]  # covered, in the order of the rows
    fitted_requests: tuple[int, ...]  # what the predictor has seen while it was fitted
    parameter_bytes: int = 0  # what must be held in memory to guess
    event_us: float | None = None  # median microseconds per event; None = not measured
    event_us_from: str | None = None  # of `TIMED`; None = not said
    event_us_p99: float | None = None  # 99th percentile; of single events only
    fitted_trace: str | None = (
        None  # key of the trace that `fitted_requests` are of; None = `trace`
    )

    def __post_init__(self) -> None:
        for name in ("horizons", "requests", "fitted_requests"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = (self.n_experts, self.n_layers, self.width, self.parameter_bytes)
        listed = (*self.horizons, *self.requests, *self.fitted_requests)
        claims = {
            "sizes, horizons and requests must be whole numbers": all(
                type(number) is int for number in (*numbers, *listed)
            ),
            "n_experts must be from 1 to 65535, n_layers at least 1": 1 <= self.n_experts < 2**16
            and self.n_layers >= 1,
            f"causality must be one of {CAUSALITIES}": self.causality in CAUSALITIES,
            "width must be from 1 to n_experts": 1 <= self.width <= self.n_experts,
            "horizons must be distinct and at least 1": bool(self.horizons)
            and min(self.horizons) >= 1
            and len(set(self.horizons)) == len(self.horizons),
            "requests must ascend": list(self.requests) == sorted(set(self.requests)),
            f"event_us_from must be one of {TIMED}": self.event_us_from in (None, *TIMED),
        }
        for claim, holds in claims.items():
            if not holds:
                raise FormatError(f"predictions of {self.predictor}: {claim}; got {self}")

    @property
    def fitted_here(self) -> tuple[int, ...]:
        """Requests of the trace that the guesses are about."""
        return self.fitted_requests if self.fitted_trace in (None, self.trace) else ()


@dataclass(frozen=True, eq=False)
class Predictions:
    """A block of guesses: best first, the dtype's maximum = no guess."""

    card: PredictionsCard
    request_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    ids_THLP: IdArray
    scores_THLP: NDArray[np.float16]

    def __post_init__(self) -> None:
        card, n_tokens = self.card, len(self.request_T)
        shape = (n_tokens, len(card.horizons), card.n_layers, card.width)
        dtype = id_dtype(card.n_experts)
        if self.ids_THLP.shape != shape or self.ids_THLP.dtype != dtype:
            raise FormatError(
                f"ids_THLP: expected {list(shape)} of {dtype}, got {list(self.ids_THLP.shape)} of "
                f"{self.ids_THLP.dtype}"
            )
        if self.scores_THLP.shape != shape or self.scores_THLP.dtype != np.float16:
            raise FormatError(
                f"scores_THLP: expected {list(shape)} of float16, got "
                f"{list(self.scores_THLP.shape)} of {self.scores_THLP.dtype}"
            )
        if len(self.position_T) != n_tokens:
            raise FormatError(f"position_T: expected {n_tokens} rows, got {len(self.position_T)}")
        nobody = no_expert(card.n_experts)
        outside = (self.ids_THLP >= card.n_experts) & (self.ids_THLP != nobody)
        if outside.any():
            t, h, layer, _ = (int(x) for x in np.argwhere(outside)[0])
            raise FormatError(
                f"row {t}, horizon {card.horizons[h]}, layer slot {layer}: expert id "
                f"{int(self.ids_THLP[outside][0])} is out of range for {card.n_experts} experts"
            )
        if np.isnan(self.scores_THLP[self.ids_THLP != nobody]).any():
            raise FormatError(f"predictions of {card.predictor}: a guess has no score (NaN)")


class PredictionsWriter:
    """`append` blocks in the order of the trace's rows, then `close`."""

    def __init__(self, folder: Path, card: PredictionsCard) -> None:
        self._folder, self._card = folder, card
        self._shards = ShardWriter(folder, CODEC)
        self._requests: list[int] = []

    def append(self, block: Predictions) -> None:
        if block.card != self._card:
            raise FormatError(
                "predictions: every block must have the card that the file began with"
            )
        if (np.diff(block.request_T, prepend=self._requests[-1:] or [-1]) < 0).any():
            raise FormatError("predictions: requests must ascend, as in the trace")
        row_bytes = max(1, block.ids_THLP[:1].nbytes + block.scores_THLP[:1].nbytes + 8)
        step = max(1, GROUP_BYTES // row_bytes)
        for start in range(0, len(block.request_T), step):
            rows = slice(start, start + step)
            table = pa.table(
                {
                    "request": pa.array(block.request_T[rows]),
                    "position": pa.array(block.position_T[rows]),
                    "ids": binary(block.ids_THLP[rows]),
                    "scores": binary(block.scores_THLP[rows]),
                }
            )
            fresh = [
                r for r in np.unique(block.request_T[rows]).tolist() if [r] != self._requests[-1:]
            ]
            self._requests += fresh
            self._shards.write({"predictions": table}, len(fresh))
            if self._shards.is_full:
                self._shards.close()

    def close(self) -> None:
        self._shards.close()
        if tuple(self._requests) != self._card.requests:
            raise FormatError(
                f"predictions: promised the requests {self._card.requests[:5]}... ({len(self._card.requests)}), "
                f"wrote {self._requests[:5]}... ({len(self._requests)})"
            )
        about = {"schema": SCHEMA, "card": asdict(self._card), "shards": self._shards.shards}
        (self._folder / "predictions.json").write_text(json.dumps(about, indent=1) + "\n")


class PredictionsReader:
    """Reads guesses in blocks; opening it reads `predictions.json` only."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "predictions.json"
        about = read_json(path, SCHEMA)
        with reading(path, "the description of guesses"):
            self.card = PredictionsCard(**about["card"])
            self._shards = [(int(shard["number"]), int(shard["rows"])) for shard in about["shards"]]
        self.n_tokens = sum(rows for _, rows in self._shards)

    def check_fits(
        self, *, trace: str, n_experts: int, n_layers: int, requests: Collection[int] = ()
    ) -> None:
        """Guesses about another trace, of another shape, or fitted on the requests that are asked, are refused."""
        expected = {"trace": trace, "n_experts": n_experts, "n_layers": n_layers}
        for name, value in expected.items():
            found = getattr(self.card, name)
            if found != value:
                raise FormatError(
                    f"{self.folder}: guesses about something else: {name} is {found}, expected {value}; have guesses "
                    "made about this trace, or pass trace=DIR, the one that they are about"
                )
        seen = sorted({*requests} & {*self.card.fitted_here})
        if seen:
            raise FormatError(
                f"{self.folder}: fitted on {len(seen)} of the {len(requests)} requests that are asked "
                f"(request {seen[0]} is the first): expected guesses about requests that were not fitted on"
            )

    def batches(self, max_rows: int = 1 << 16) -> Iterator[Predictions]:
        card = self.card
        shape = (len(card.horizons), card.n_layers, card.width)
        dtype = id_dtype(card.n_experts)
        for path, batch in self._read(max_rows):
            with reading(path, "a Parquet shard of guesses"):
                block = self._block(batch, dtype, shape)
            yield block

    def rows(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Requests and positions of the rows alone, without the guesses."""
        for path, batch in self._read(1 << 20, ["request", "position"]):
            with reading(path, "a Parquet shard of guesses"):
                request_T, position_T = (column.to_numpy() for column in batch.columns)
            yield request_T, position_T

    def _read(self, max_rows: int, columns: list[str] | None = None) -> Iterator[tuple[Path, Any]]:
        """Batches of Parquet, each with its file."""
        seen: list[int] = []
        for number, rows in self._shards:
            path = self.folder / f"predictions-{number:05d}.parquet"
            with (
                reading(path, "a Parquet shard of guesses"),
                pq.ParquetFile(path, pre_buffer=False) as file,
            ):
                check_packed(file.metadata, path)
                if file.metadata.num_rows != rows:
                    raise FormatError(f"expected {rows} rows, found {file.metadata.num_rows}")
                for batch in file.iter_batches(max_rows, columns=columns):
                    requests = np.unique(batch.column("request").to_numpy()).tolist()
                    seen += [r for r in requests if [r] != seen[-1:]]
                    yield path, batch
        if tuple(seen) != self.card.requests:
            raise FormatError(
                f"{self.folder}: its card promises {len(self.card.requests)} requests, found {len(seen)}"
            )

    def _block(self, batch: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Predictions:
        return Predictions(
            card=self.card,
            request_T=batch.column("request").to_numpy(),
            position_T=batch.column("position").to_numpy(),
            ids_THLP=unbinary(batch.column("ids"), dtype, shape),
            scores_THLP=unbinary(batch.column("scores"), np.dtype(np.float16), shape),
        )
