"""What would help: bytes of experts, and what pinning, replicas, placement and capacity would change.

Every effect but that of capacity is computed by replay on requests that it was not fitted on; where data are missing
there is no row.
L layers, E experts, F capacity factors, R ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.routing.batch import layer_columns
from analysis.routing.sums import share_of
from analysis.routing.windows import FACTORS_F, MOST_DROPPED, Windows, dropped_share
from prefetch.errors import MissingData
from prefetch.trace.card import ModelCard


def memory(
    counts_LE: NDArray[np.int64], working_sets_table: pd.DataFrame | None, card: ModelCard
) -> pd.DataFrame:
    """Bytes of experts per layer: all, those ever chosen, those a token needs, those that windows of tokens need."""
    if card.expert_bytes_L is None:
        raise MissingData(f"the model card of {card.name} does not tell the bytes of an expert")
    names = layer_columns(card, np.arange(card.n_layers))
    size_L = np.array(card.expert_bytes_L)
    table = pd.DataFrame(
        {
            **names,
            "expert_bytes": size_L,
            "all_bytes": size_L * card.n_experts,
            "touched_bytes": size_L * (counts_LE > 0).sum(axis=1),
            "bytes_per_token": size_L * card.top_k,
        }
    )
    for window in (64, 1024):
        sets = working_sets_table
        if sets is None:
            sets = pd.DataFrame(columns=[*names, "window", "mean_experts"], dtype=float)
        rows = sets.loc[sets.window == window, [*names, "mean_experts"]]
        mean_L = table[list(names)].merge(rows, how="left", on=list(names)).mean_experts
        table[f"bytes_window_{window}"] = size_L * mean_L
    return table


class Remedy(NamedTuple):
    remedy: str
    setting: str
    before: float
    after: float
    unit: str
    complexity: str  # low | medium | high
    how: str


def remedies(
    train_counts_LE: NDArray[np.int64],
    test_counts_LE: NDArray[np.int64],
    card: ModelCard,
    windows: Windows | None,
) -> pd.DataFrame:
    """What each would have changed, means over layers: decided on training requests, computed on test requests.

    Not so the capacity: its factor is the smallest that would have been enough for the very windows it is scored on.
    """
    used_L = train_counts_LE.any(axis=1) & test_counts_LE.any(axis=1)
    train_LE, test_LE = train_counts_LE[used_L], test_counts_LE[used_L]
    rows = [] if windows is None else _capacity(windows)
    if used_L.any():
        pinned = _pinned(train_LE, test_LE, card)
        rows = [*pinned, *_replicated(train_LE, test_LE, card), *rows, *_placed(train_LE, test_LE)]
    return pd.DataFrame(rows, columns=list(Remedy._fields))


def _pinned(train_LE: NDArray[Any], test_LE: NDArray[Any], card: ModelCard) -> list[Remedy]:
    """A cache that never changes."""
    n, order_LE = test_LE.shape[1], np.argsort(-train_LE, axis=1, kind="stable")
    held_LE = np.cumsum(np.take_along_axis(share_of(test_LE), order_LE, axis=1), axis=1)
    how = "computed from test choices; experts by training counts; before: as many picked blindly"
    unit = "share of choices held"
    return [
        Remedy("pin experts", _each(m, card), m / n, held_LE[:, m - 1].mean(), unit, "low", how)
        for m in sorted({max(1, n // part) for part in (8, 4, 2)})
    ]


def _replicated(train_LE: NDArray[Any], test_LE: NDArray[Any], card: ModelCard) -> list[Remedy]:
    """Every replica goes to the expert whose copies are loaded most, as DeepSeek's EPLB does."""
    n, layers = test_LE.shape[1], np.arange(len(test_LE))
    rows: list[Remedy] = []
    copies_LE = np.ones(test_LE.shape, np.int64)
    how = "computed from test choices shared evenly by the copies; replicas by training counts"
    unit, before = "max / mean load", _busiest(share_of(test_LE) * n)
    for extra in range(1, max(1, n // 8) + 1):
        copies_LE[layers, (train_LE / copies_LE).argmax(axis=1)] += 1
        if extra in (1, n // 16, n // 8):
            after = _busiest(share_of(test_LE) / copies_LE * (n + extra))
            setting = _each(extra, card)
            rows.append(Remedy("replicate experts", setting, before, after, unit, "high", how))
    return rows


def _each(experts: int, card: ModelCard) -> str:
    """With what it takes, where the sizes are known."""
    size_L = card.expert_bytes_L
    if size_L is None:
        return f"{experts} per layer"
    n_bytes = experts * sum(size_L)
    size = f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"
    return f"{experts} per layer ({size} in all)"


def _placed(train_LE: NDArray[Any], test_LE: NDArray[Any]) -> list[Remedy]:
    n = test_LE.shape[1]
    how = (
        "computed from test choices; before: blocks of ids; after: heaviest first to the least "
        "loaded rank, by training counts"
    )
    unit = "max / mean load of a rank"
    rows: list[Remedy] = []
    for ranks in (ranks for ranks in (2, 4, 8) if n % ranks == 0):
        blocks_LE = np.broadcast_to(np.arange(n) // (n // ranks), test_LE.shape)
        before, after = (
            _busiest(_on_ranks(test_LE, ranks_LE, ranks))
            for ranks_LE in (blocks_LE, _spread_evenly(train_LE, ranks))
        )
        rows.append(Remedy("place experts", f"{ranks} ranks", before, after, unit, "medium", how))
    return rows


def _spread_evenly(train_LE: NDArray[Any], ranks: int) -> NDArray[np.int64]:
    """Rank of every expert: the heaviest that is left goes to the least loaded rank that has room."""
    n, layers = train_LE.shape[1], np.arange(len(train_LE))
    rank_LE = np.zeros(train_LE.shape, np.int64)
    load_LR, members_LR = np.zeros((2, len(train_LE), ranks))
    for expert_L in np.argsort(-train_LE, axis=1, kind="stable").T:
        rank_L = np.where(members_LR < n // ranks, load_LR, np.inf).argmin(axis=1)
        rank_LE[layers, expert_L] = rank_L
        load_LR[layers, rank_L] += train_LE[layers, expert_L]
        members_LR[layers, rank_L] += 1
    return rank_LE


def _on_ranks(counts_LE: NDArray[Any], rank_LE: NDArray[Any], ranks: int) -> NDArray[np.float64]:
    loads = [np.where(rank_LE == rank, counts_LE, 0).sum(axis=1) for rank in range(ranks)]
    load_LR = np.stack(loads, axis=1)
    return load_LR / load_LR.mean(axis=1, keepdims=True)


def _capacity(windows: Windows) -> list[Remedy]:
    """The smallest factor that keeps every layer within `MOST_DROPPED`; no row where none does."""
    sums = windows.total()
    used_L = sums.choices_L > 0
    dropped_LF = dropped_share(sums)[used_L]
    enough_F = (dropped_LF <= MOST_DROPPED).all(axis=0)
    if not enough_F.any():
        return []
    f = int(enough_F.argmax())
    before, after = dropped_LF[:, FACTORS_F == 1.0].mean(), dropped_LF[:, f].mean()
    how = (
        f"computed from windows of {windows.tokens} rows of all requests, the same that the factor is chosen on (it "
        f"is no forecast); before: factor 1; every layer within {MOST_DROPPED:.0%}; for engines with a capacity only"
    )
    setting, unit = f"factor {FACTORS_F[f]:g}", "share of choices dropped"
    return [Remedy("raise capacity", setting, before, after, unit, "low", how)]


def _busiest(ratio_LE: NDArray[np.float64]) -> float:
    """Largest load over the mean, mean over layers."""
    return float(ratio_LE.max(axis=1).mean())
