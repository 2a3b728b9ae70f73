"""Guesses that somebody else made: a predictions folder, or an npz with ids; scored like our own.

What they were allowed to see cannot be checked here; it is what the file, or `causality`, declares. A folder says which
trace it is about and which requests it was fitted on: that is checked. An npz says neither: its maker answers for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prefetch import zipped
from prefetch.errors import ConfigError, FormatError, reading
from prefetch.predict.part import Part
from prefetch.predict.past import Past
from prefetch.predict.predictor import ANSWER, NOT_GUESSED, Declared, horizons_of
from prefetch.trace.blocks import blocks_of
from prefetch.trace.predictions import CAUSALITIES, PredictionsReader
from prefetch.trace.routing import no_expert

NPZ = ("ids", "scores", "horizons", "request", "position")


@dataclass
class Imported:
    """`path`: a folder with predictions.json, or an npz with `ids` [T, L, P] or [T, H, L, P].

    An npz may hold `scores` of the same shape, `horizons` [H], and `request` and `position` [T]; without these its rows
    are those of the trace that is asked about, in order.
    """

    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()

    path: str | None = None
    horizons: tuple[int, ...] = (1,)
    causality: str = "decode"  # of an npz: decode | prefill | cheats
    sees: str = field(default="as declared: decode", init=False)
    score: str = field(default="rank", init=False)
    declared: Declared = field(default_factory=Declared, init=False)

    def __post_init__(self) -> None:
        self.horizons = horizons_of(self.horizons)
        if self.causality not in CAUSALITIES:
            raise ConfigError(f"causality: expected one of {CAUSALITIES}, got {self.causality!r}")
        if self.path is None:
            raise ConfigError("path: must be given: the folder or npz that holds the guesses")
        if not Path(self.path).exists():
            raise ConfigError(f"path={self.path}: not found")
        self.declared = _said_by(self.path) if self._is_folder else Declared(self.causality)
        causality = self.declared.causality
        self.sees = ANSWER if causality == "cheats" else f"as declared: {causality}"

    @property
    def files(self) -> dict[str, Path]:
        """Whose content the result depends on."""
        path = Path(str(self.path))
        paths = sorted(path.iterdir()) if path.is_dir() else [path]
        return {part.name: part for part in paths if part.is_file()}

    @property
    def _is_folder(self) -> bool:
        return Path(str(self.path)).is_dir()

    def check_fits(self, trace: str, part: Part) -> None:
        """A folder about another trace, or fitted on a request of the part, is refused; an npz does not say."""
        if self._is_folder:
            card, requests = part.card, part.asked().tolist()
            PredictionsReader(str(self.path)).check_fits(
                trace=trace, n_experts=card.n_experts, n_layers=card.n_layers, requests=requests
            )

    def fit(self, train: Part, validation: Part) -> Self:
        """Reads them; nothing is fitted."""
        self._take(
            *(_of_folder(str(self.path)) if self._is_folder else _of_npz(str(self.path), train))
        )
        return self

    def _take(
        self, row_T2: NDArray[np.int64], ids_THLP: NDArray[Any], scores_THLP: NDArray[Any], horizons: list[int]
    ) -> None:  # fmt: skip
        missing = [horizon for horizon in self.horizons if horizon not in horizons]
        if missing:
            raise ConfigError(
                f"{self.path}: guesses for the horizons {horizons}, not for {missing}; pass train.horizons={horizons}"
            )
        order = np.lexsort((row_T2[:, 1], row_T2[:, 0]))
        again = np.flatnonzero((np.diff(row_T2[order], axis=0) == 0).all(axis=1))
        if len(again):
            request, position = row_T2[order][again[0]].tolist()
            raise FormatError(f"{self.path}: two rows for request {request}, position {position}")
        chosen = [horizons.index(horizon) for horizon in self.horizons]
        self.row_T2_ = row_T2[order]
        self.ids_THLP_ = ids_THLP[order][:, chosen]
        self.scores_THLP_ = scores_THLP[order][:, chosen].astype(np.float32)

    def scores(self, past: Past) -> NDArray[np.float32]:
        place_T = self._places(past)
        h = self.horizons.index(past.horizon)
        ids, scores = self.ids_THLP_[place_T, h].astype(np.int64), self.scores_THLP_[place_T, h]
        ids[place_T < 0] = past.nobody
        self._check(ids, past)
        n_experts = past.card.n_experts
        beyond = np.where(ids == past.nobody, n_experts, ids)
        scores_TLE = np.full((*past.shape[:2], n_experts + 1), NOT_GUESSED, np.float32)
        np.put_along_axis(scores_TLE, beyond, scores, axis=2)
        return scores_TLE[:, :, :n_experts]

    def _places(self, past: Past) -> NDArray[np.int64]:
        """Where each row's guesses stand; -1 before the first row of a request, where it is split in time."""
        keys = self.row_T2_[:, 0] << 32 | self.row_T2_[:, 1]
        wanted = past.request_T.astype(np.int64) << 32 | past.position_T
        place_T = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        is_next_T = keys[place_T] >> 32 == past.request_T
        is_first_T = is_next_T & ((place_T == 0) | (keys[place_T - 1] >> 32 != past.request_T))
        is_before_T = is_first_T & (keys[place_T] > wanted)
        absent = np.flatnonzero((keys[place_T] != wanted) & ~is_before_T)
        if len(absent):
            t = int(absent[0])
            raise FormatError(
                f"{self.path}: no guesses for request {past.request_T[t]}, position {past.position_T[t]}; every "
                "request that is tested must be covered (train.folds=1 tests a fifth of them)"
            )
        return np.where(is_before_T, -1, place_T)

    def _check(self, ids_TLP: NDArray[np.int64], past: Past) -> None:
        n_layers, n_experts = past.card.n_layers, past.card.n_experts
        if ids_TLP.shape[1] != n_layers:
            raise FormatError(
                f"{self.path}: guesses for {ids_TLP.shape[1]} layers, the trace has {n_layers}"
            )
        outside = (ids_TLP < 0) | ((ids_TLP >= n_experts) & (ids_TLP != past.nobody))
        if outside.any():
            t, layer, _ = (int(x) for x in np.argwhere(outside)[0])
            raise FormatError(
                f"{self.path}: request {past.request_T[t]}, position {past.position_T[t]}, layer slot {layer}: "
                f"expert id {ids_TLP[outside][0]} is out of range for {n_experts} experts"
            )
        inside_TLP = np.sort(ids_TLP, axis=2)
        twice = (np.diff(inside_TLP, axis=2) == 0) & (inside_TLP[:, :, 1:] != past.nobody)
        if twice.any():
            t, layer, place = (int(x) for x in np.argwhere(twice)[0])
            raise FormatError(
                f"{self.path}: request {past.request_T[t]}, position {past.position_T[t]}, layer slot {layer}: "
                f"expert {inside_TLP[t, layer, place]} is guessed twice"
            )


def _said_by(folder: str) -> Declared:
    card = PredictionsReader(folder).card
    return Declared(
        causality=card.causality,
        trace=card.trace,
        fitted_requests=card.fitted_requests,
        fitted_trace=card.fitted_trace,
        parameter_bytes=card.parameter_bytes,
        event_us=card.event_us,
        event_us_p99=card.event_us_p99,
    )


def _of_folder(path: str) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any], list[int]]:
    reader = PredictionsReader(path)
    blocks = list(reader.batches())
    rows = [np.stack([b.request_T, b.position_T], axis=1).astype(np.int64) for b in blocks]
    ids = np.concatenate([block.ids_THLP for block in blocks])
    scores = np.concatenate([block.scores_THLP for block in blocks])
    return np.concatenate(rows), ids, scores, list(reader.card.horizons)


def _of_npz(
    path: str, train: Part
) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any], list[int]]:
    with reading(path, "an npz with `ids`"):
        names = zipped.names_in(Path(path))
        arrays = {name: zipped.whole(Path(path), name) for name in names if name in NPZ}
        if "ids" not in arrays:
            raise FormatError(f"expected an array `ids`, found {sorted(names)}")
        ids, horizons = _ids_of(arrays["ids"], arrays.get("horizons"))
        ids = np.where(ids < 0, no_expert(train.card.n_experts), ids)
        named = {name: arrays[name] for name in ("request", "position") if name in arrays}
        if len(named) == 1:
            (name,) = named
            raise FormatError(
                f"`{name}` alone names no row; give `request` and `position`, or neither"
            )
        for name, array in named.items():
            if array.shape != ids.shape[:1] or array.dtype.kind not in "iu":
                raise FormatError(
                    f"{name}: expected {len(ids)} whole numbers, found {array.dtype} {list(array.shape)}"
                )
        rows = np.stack([*named.values()], axis=1) if named else _rows_of(train)
        if len(rows) != len(ids):
            raise FormatError(f"{len(ids)} rows of ids, expected {len(rows)}")
        return rows.astype(np.int64), ids, _scores_of(arrays.get("scores"), ids, path), horizons


def _ids_of(ids: NDArray[Any], horizons: NDArray[Any] | None) -> tuple[NDArray[Any], list[int]]:
    """[T, H, L, P], and the H horizons."""
    if ids.dtype.kind not in "iu" or ids.ndim not in (3, 4):
        raise FormatError(
            f"ids: expected whole numbers [token, layer, guess] or [token, horizon, layer, guess], got "
            f"{ids.dtype} {list(ids.shape)}"
        )
    listed = np.ones(1, int) if horizons is None else horizons
    ids = ids[:, None] if ids.ndim == 3 else ids
    if listed.shape != ids.shape[1:2] or listed.dtype.kind not in "iu":
        raise FormatError(
            f"ids for {ids.shape[1]} horizons, `horizons` names {listed.tolist()} (without it they are of horizon 1)"
        )
    return ids, listed.tolist()


def _scores_of(scores: NDArray[Any] | None, ids: NDArray[Any], path: str) -> NDArray[Any]:
    if scores is None:  # the order of the guesses is all that is known
        return np.broadcast_to(-np.arange(ids.shape[3], dtype=np.float32), ids.shape)
    scores = scores[:, None] if scores.ndim == 3 else scores
    if scores.shape != ids.shape:
        raise FormatError(f"{path}: scores {list(scores.shape)} do not fit ids {list(ids.shape)}")
    if not np.isfinite(scores).all():
        t, h, layer, place = (int(x) for x in np.argwhere(~np.isfinite(scores))[0])
        raise FormatError(
            f"{path}: row {t}, horizon number {h}, layer slot {layer}, guess {place}: the score is "
            f"{scores[t, h, layer, place]}"
        )
    return scores


def _rows_of(part: Part) -> NDArray[np.int64]:
    """(request, position) of every executed row of the trace."""
    return np.concatenate(
        [
            np.stack([block.request_T, block.position_T], axis=1)[block.executed_T]
            for block in blocks_of(part.trace)
        ]
    )
