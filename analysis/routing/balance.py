"""Whether every expert carries its part: load with significance, health, capacity, hotspots, memory, remedies.

It knows no router scores and no time; whatever it proposes was computed from the counts, and where they are missing
there is no row. An expert counts as dead only where so many tokens cannot have missed it by chance.
T tokens, L layers, K choices, E experts, F capacity factors, S stretches of rows in one window, R ranks.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray

from analysis.routing.batch import (
    Batch,
    Plan,
    Traceable,
    accumulate,
    for_layers,
    layer_columns,
    plan_of,
)
from analysis.routing.statistics import Usage, entropy_bits, gini
from prefetch.errors import MissingData
from prefetch.trace.card import ModelCard
from prefetch.trace.counts import ExpertCounts

WINDOW_TOKENS = 1024
FACTORS_F = np.array([0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0])
MOST_DROPPED = 0.01
SIGNIFICANCE = 0.01
TOO_FEW = "unused: too few tokens"


class Sums(NamedTuple):
    """Over windows that are over; the first five leave out those of fewer rows than half a window."""

    full_L: NDArray[np.int64]  # how many
    counts_LE: NDArray[np.int64]
    squares_LE: NDArray[np.int64]
    worst_LE: NDArray[np.float64]  # largest load over the mean
    violation_L: NDArray[np.float64]
    choices_L: NDArray[np.int64]
    dropped_LF: NDArray[np.int64]
    slots_LF: NDArray[np.int64]


class Windows:
    """Loads in windows of consecutive rows of the whole trace, reduced as soon as a window is over.

    The first and the last window of what was seen stay open: the rows before and behind may belong to them.
    """

    def __init__(self, plan: Plan, tokens: int = WINDOW_TOKENS) -> None:
        shape = (plan.card.n_layers, plan.card.n_experts)
        by_factor = (plan.card.n_layers, len(FACTORS_F))
        self.plan, self.tokens = plan, tokens
        self.sums = Sums(
            np.zeros(shape[0], np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape),
            np.zeros(shape[0]),
            np.zeros(shape[0], np.int64),
            np.zeros(by_factor, np.int64),
            np.zeros(by_factor, np.int64),
        )
        # window -> counts [L, E] and, behind them, rows that have an expert
        self.open: dict[int, NDArray[np.int64]] = {}

    def add(self, batch: Batch) -> None:
        window_T = batch.row_T // self.tokens
        bounds_S = np.flatnonzero(np.diff(window_T, prepend=-1, append=-1))
        card = self.plan.card
        edges = np.zeros((2, card.n_layers, card.n_experts + 1), np.int64)

        def count(layer: int) -> None:
            ids_TK = batch.ids_LTK[layer]
            _count_windows(
                ids_TK, bounds_S, batch.nobody, layer, edges, self._least, card.top_k, self.sums
            )

        for_layers(count, card.n_layers)
        self._join({int(window_T[0]): edges[0]})
        self._join({int(window_T[-1]): edges[1]})  # zeros where it is the first one
        self._close()

    def merge(self, later: Windows) -> None:
        for name, mine, other in zip(Sums._fields, self.sums, later.sums, strict=True):
            mine[:] = np.maximum(mine, other) if name == "worst_LE" else mine + other
        self._join(later.open)
        self._close()

    def _join(self, more: dict[int, NDArray[np.int64]]) -> None:
        for window, counts in more.items():
            self.open[window] = self.open[window] + counts if window in self.open else counts

    def _close(self) -> None:
        for window in sorted(self.open)[1:-1]:
            self._reduce(self.open.pop(window), self.sums)

    def _reduce(self, counts_LE: NDArray[np.int64], sums: Sums) -> None:
        for layer in range(len(counts_LE)):
            _reduce(counts_LE[layer], layer, self._least, self.plan.card.top_k, sums)

    @property
    def _least(self) -> int:
        """Fewer rows than these are no full window."""
        return -(-self.tokens // 2)

    def total(self) -> Sums:
        """With the open windows."""
        sums = copy.deepcopy(self.sums)
        for counts_LE in self.open.values():
            self._reduce(counts_LE, sums)
        return sums


@njit(cache=True, nogil=True)
def _count_windows(ids_TK, bounds_S, nobody, layer, edges, least, top_k, sums):  # type: ignore[no-untyped-def]
    """The first and the last stretch go to `edges`, those between are whole windows."""
    rows_at = edges.shape[2] - 1
    inner_E = np.zeros(edges.shape[2], np.int64)
    last = len(bounds_S) - 2
    for s in range(last + 1):
        counts_E = inner_E
        if s == 0:
            counts_E = edges[0, layer]
        elif s == last:
            counts_E = edges[1, layer]
        for t in range(bounds_S[s], bounds_S[s + 1]):
            is_used = False
            for k in range(ids_TK.shape[1]):
                if ids_TK[t, k] != nobody:
                    counts_E[ids_TK[t, k]] += 1
                    is_used = True
            counts_E[rows_at] += is_used
        if 0 < s < last:
            _reduce(inner_E, layer, least, top_k, sums)
            inner_E[:] = 0


@njit(cache=True, nogil=True)
def _reduce(counts_E, layer, least, top_k, sums):  # type: ignore[no-untyped-def]
    n_experts, rows = len(counts_E) - 1, counts_E[-1]
    counts_E = counts_E[:-1]
    choices = counts_E.sum()
    if choices == 0:
        return
    sums.choices_L[layer] += choices
    for f in range(len(FACTORS_F)):
        room = int(np.ceil(FACTORS_F[f] * rows * top_k / n_experts))
        sums.slots_LF[layer, f] += n_experts * room
        for expert in range(n_experts):
            sums.dropped_LF[layer, f] += max(0, counts_E[expert] - room)
    if rows >= least:
        sums.full_L[layer] += 1
        sums.violation_L[layer] += counts_E.max() * n_experts / choices - 1
        for expert in range(n_experts):
            count = counts_E[expert]
            sums.counts_LE[layer, expert] += count
            sums.squares_LE[layer, expert] += count * count
            ratio = count * n_experts / choices
            sums.worst_LE[layer, expert] = max(sums.worst_LE[layer, expert], ratio)


def fano(sums: Sums) -> NDArray[np.float64]:
    """Variance over mean of an expert's load in full windows, [L, E]: 1 - its share for independent choices."""
    n_L1, total_LE = sums.full_L[:, None].astype(float), sums.counts_LE.astype(float)
    variance_LE = _ratio(sums.squares_LE - _ratio(total_LE**2, n_L1), n_L1 - 1)
    return _ratio(np.maximum(0, variance_LE) * n_L1, total_LE)


def load(
    counts_LE: NDArray[np.int64],
    tokens_L: NDArray[np.int64],
    top_k: int,
    card: ModelCard,
    *,
    significance: float = SIGNIFICANCE,
    under: float = 0.5,
    over: float = 2.0,
) -> pd.DataFrame:
    """One row per layer and expert, in the order of the counts.

    z: against every expert being equally likely, tokens taken as independent. q_value: Benjamini-Hochberg within the
    layer. Under- or overused is what is significant and beyond the threshold of share x E.
    """
    n_experts, total_L1 = counts_LE.shape[1], counts_LE.sum(axis=1, keepdims=True)
    share_LE = _ratio(counts_LE, total_L1)
    z_LE = _z_values(counts_LE, tokens_L, top_k)
    p_LE = np.reshape([math.erfc(abs(z) / math.sqrt(2)) for z in z_LE.ravel()], z_LE.shape)
    q_LE, ratio_LE = _q_values(p_LE), share_LE * n_experts
    is_sure_LE = q_LE <= significance
    enough_L1 = (tokens_L >= tokens_for_dead(counts_LE, tokens_L, top_k, significance))[:, None]
    state_LE = np.select(
        [
            (counts_LE == 0) & enough_L1,
            counts_LE == 0,
            is_sure_LE & (ratio_LE < under),
            is_sure_LE & (ratio_LE > over),
        ],
        ["dead", TOO_FEW, "underused", "overused"],
        "balanced",
    )
    layer, expert = np.indices(counts_LE.shape).reshape(2, -1)
    columns = {"count": counts_LE, "share": share_LE, "ratio": ratio_LE, "z": z_LE}
    columns |= {"p_value": p_LE, "q_value": q_LE, "state": state_LE}
    flat = {name: values.ravel() for name, values in columns.items()}
    return pd.DataFrame({**layer_columns(card, layer), "expert": expert, **flat})


def _made(counts_LE: NDArray[Any], tokens_L: NDArray[Any], top_k: int) -> NDArray[np.float64]:
    """Choices per token: fewer than k where some name no expert."""
    made_L = _ratio(counts_LE.sum(axis=1), tokens_L)
    return np.where(np.isnan(made_L), top_k, np.minimum(top_k, made_L))


def _z_values(counts_LE: NDArray[Any], tokens_L: NDArray[Any], top_k: int) -> NDArray[np.float64]:
    """0 where nothing can vary (k = E), NaN where nothing was chosen."""
    p_L = _made(counts_LE, tokens_L, top_k) / counts_LE.shape[1]
    spread_L1 = np.sqrt(tokens_L * p_L * np.maximum(0, 1 - p_L))[:, None]
    off_LE = counts_LE - counts_LE.mean(axis=1, keepdims=True)
    z_LE = np.divide(off_LE, spread_L1, out=np.zeros(off_LE.shape), where=spread_L1 > 0)
    return np.where(counts_LE.any(axis=1, keepdims=True), z_LE, np.nan)


def _q_values(p_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Benjamini and Hochberg (1995), over the last axis."""
    n, order_LE = p_LE.shape[-1], np.argsort(p_LE, axis=-1, kind="stable")
    scaled_LE = np.take_along_axis(p_LE, order_LE, -1) * n / np.arange(1, n + 1)
    least_LE = np.minimum.accumulate(scaled_LE[..., ::-1], axis=-1)[..., ::-1]
    q_LE = np.empty_like(p_LE)
    np.put_along_axis(q_LE, order_LE, np.minimum(1, least_LE), -1)
    return q_LE


def tokens_for_dead(
    counts_LE: NDArray[Any], tokens_L: NDArray[Any], top_k: int, significance: float
) -> NDArray[np.float64]:
    """So many even choices leave none of E experts out but with this chance: E (1 - k/E)^T."""
    n_experts = counts_LE.shape[1]
    missed_L = 1 - _made(counts_LE, tokens_L, top_k) / n_experts
    with np.errstate(divide="ignore"):
        return np.maximum(1, np.ceil(np.log(significance / n_experts) / np.log(missed_L)))


def health(
    counts_LE: NDArray[np.int64],
    tokens_L: NDArray[np.int64],
    top_k: int,
    card: ModelCard,
    windows: Windows | None,
    *,
    significance: float = SIGNIFICANCE,
    collapse: float = 0.5,
) -> pd.DataFrame:
    """One row per layer.

    max_violation and min_violation: load over the mean, minus 1 (arXiv 2408.15664); max_violation_windows: its mean
    over full windows. noise_floor: max_over_mean that even choices would show. unused_experts: never chosen, but too
    few tokens to call them dead. spread: entropy on the scale from log2 k, the least that k different experts per
    token can have, to log2 E; a layer below `collapse` is collapsed. Without windows, what they tell is NaN.
    """
    n_experts, n_layers = counts_LE.shape[1], len(counts_LE)
    rows = load(counts_LE, tokens_L, top_k, card, significance=significance)
    state_LE = rows.state.to_numpy().reshape(counts_LE.shape)
    ratio_LE = rows.ratio.to_numpy().reshape(counts_LE.shape)
    entropy_L, most = entropy_bits(counts_LE), np.log2(n_experts)
    least_L = np.log2(_made(counts_LE, tokens_L, top_k))
    spread_L = _ratio(entropy_L - least_L, most - least_L)
    noise_L = np.sqrt(_ratio(2 * np.log(n_experts) * n_experts, tokens_L * top_k))
    return pd.DataFrame(
        {
            **layer_columns(card, np.arange(n_layers)),
            "tokens": tokens_L,
            "max_over_mean": ratio_LE.max(axis=1),
            "max_violation": ratio_LE.max(axis=1) - 1,
            "min_violation": ratio_LE.min(axis=1) - 1,
            "noise_floor": 1 + noise_L,
            "gini": gini(counts_LE),
            "dead_experts": (state_LE == "dead").sum(axis=1),
            "unused_experts": (state_LE == TOO_FEW).sum(axis=1),
            "tokens_for_dead": tokens_for_dead(counts_LE, tokens_L, top_k, significance),
            "underused": (state_LE == "underused").sum(axis=1),
            "overused": (state_LE == "overused").sum(axis=1),
            "top_1_share": ratio_LE.max(axis=1) / n_experts,
            "normalized_entropy": _ratio(entropy_L, np.full(n_layers, most)),
            "spread": spread_L,
            "is_collapsed": spread_L < collapse,
            **_health_in_windows(windows, n_layers),
        }
    )


def _health_in_windows(windows: Windows | None, n_layers: int) -> dict[str, NDArray[np.float64]]:
    names = ("max_violation_windows", "capacity_factor_1pct", "fano_max")
    if windows is None:
        return {name: np.full(n_layers, np.nan) for name in names}
    sums = windows.total()
    enough_LF = _dropped(sums) <= MOST_DROPPED
    smallest_L = np.where(enough_LF.any(axis=1), FACTORS_F[enough_LF.argmax(axis=1)], np.nan)
    worst_L = np.where(np.isnan(fano(sums)), -np.inf, fano(sums)).max(axis=1)
    fano_L = np.where(np.isinf(worst_L), np.nan, worst_L)
    return dict(
        zip(names, (_ratio(sums.violation_L, sums.full_L), smallest_L, fano_L), strict=True)
    )


def _dropped(sums: Sums) -> NDArray[np.float64]:
    return _ratio(sums.dropped_LF, sums.choices_L[:, None])


def capacity_curve(windows: Windows) -> pd.DataFrame:
    """What if experts had a capacity of ceil(factor x rows x k / E) in every window? Dropless engines drop nothing.

    padding_share: of the slots, those that nothing fills.
    """
    sums = windows.total()
    layer, f = np.indices(sums.dropped_LF.shape).reshape(2, -1)
    filled_LF = sums.choices_L[:, None] - sums.dropped_LF
    columns = {
        **layer_columns(windows.plan.card, layer),
        "capacity_factor": FACTORS_F[f],
        "dropped_share": _dropped(sums)[layer, f],
        "padding_share": 1 - _ratio(filled_LF, sums.slots_LF)[layer, f],
    }
    return pd.DataFrame(columns)[sums.choices_L[layer] > 0].reset_index(drop=True)


def hotspots(
    load: pd.DataFrame,
    windows: Windows,
    card: ModelCard,
    most: int = 20,
    *,
    significance: float = SIGNIFICANCE,
) -> pd.DataFrame:
    """The experts with the largest significant load over the mean, and how it varied between full windows."""
    sums, shape = windows.total(), (card.n_layers, card.n_experts)
    worst_LE = np.where(sums.full_L[:, None] > 0, sums.worst_LE, np.nan)
    table = load[[name for name in load if name in (*HOTSPOT, "stack")]].assign(
        largest_window_ratio=worst_LE.ravel(), fano=fano(sums).ravel()
    )
    assert len(load) == math.prod(shape), "the rows of `load`, in its order"
    table = table[(table.q_value <= significance) & (table.ratio > 1)]
    table = table.sort_values("ratio", ascending=False, kind="stable")
    return table.head(most).reset_index(drop=True)


HOTSPOT = ("layer", "expert", "ratio", "z", "q_value")


def _ratio(above: Any, below: Any) -> NDArray[np.float64]:
    """NaN where there is nothing."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def expert_load(
    trace: Traceable | ExpertCounts,
    *,
    significance: float = SIGNIFICANCE,
    under: float = 0.5,
    over: float = 2.0,
) -> pd.DataFrame:
    """The load of every expert of a trace, or of counts, and whether it can be chance."""
    counts_LE, tokens_L, card, _ = _counted(trace, None)
    limits = {"significance": significance, "under": under, "over": over}
    return load(counts_LE, tokens_L, card.top_k, card, **limits)


def balance(
    trace: Traceable | ExpertCounts,
    *,
    tokens: int = WINDOW_TOKENS,
    significance: float = SIGNIFICANCE,
    collapse: float = 0.5,
) -> pd.DataFrame:
    """Balance and health of every layer of a trace, or of counts, which have no windows."""
    counts_LE, tokens_L, card, windows = _counted(trace, tokens)
    limits = {"significance": significance, "collapse": collapse}
    return health(counts_LE, tokens_L, card.top_k, card, windows, **limits)


def _counted(
    trace: Traceable | ExpertCounts, window_tokens: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], ModelCard, Windows | None]:
    if isinstance(trace, ExpertCounts):
        counts_LE, card = trace.counts_LE, trace.card
        return counts_LE, counts_LE.sum(axis=1) // card.top_k, card, None
    plan = plan_of(trace)
    usage = Usage(plan)
    windows = None if window_tokens is None else Windows(plan, window_tokens)
    accumulate(trace, plan, [usage] if windows is None else [usage, windows])
    return usage.counts(), usage.tokens(), plan.card, windows


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
    """What each would have changed: decided on training requests, computed on test requests, means over layers."""
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
    held_LE = np.cumsum(np.take_along_axis(_share(test_LE), order_LE, axis=1), axis=1)
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
    unit, before = "max / mean load", _busiest(_share(test_LE) * n)
    for extra in range(1, max(1, n // 8) + 1):
        copies_LE[layers, (train_LE / copies_LE).argmax(axis=1)] += 1
        if extra in (1, n // 16, n // 8):
            after = _busiest(_share(test_LE) / copies_LE * (n + extra))
            setting = _each(extra, card)
            rows.append(Remedy("replicate experts", setting, before, after, unit, "high", how))
    return rows


def _each(experts: int, card: ModelCard) -> str:
    """With what it takes, where the sizes are known."""
    size_L = card.expert_bytes_L
    takes = "" if size_L is None else f" ({experts * sum(size_L) / 1e9:.3g} GB in all)"
    return f"{experts} per layer{takes}"


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
    dropped_LF = _dropped(sums)[used_L]
    enough_F = (dropped_LF <= MOST_DROPPED).all(axis=0)
    if not enough_F.any():
        return []
    f = int(enough_F.argmax())
    before, after = dropped_LF[:, FACTORS_F == 1.0].mean(), dropped_LF[:, f].mean()
    how = (
        f"computed from windows of {windows.tokens} rows; before: factor 1; every layer within "
        f"{MOST_DROPPED:.0%}; for engines with a capacity only"
    )
    setting, unit = f"factor {FACTORS_F[f]:g}", "share of choices dropped"
    return [Remedy("raise capacity", setting, before, after, unit, "low", how)]


def _share(counts_LE: NDArray[Any]) -> NDArray[np.float64]:
    return _ratio(counts_LE, counts_LE.sum(axis=1, keepdims=True))


def _busiest(ratio_LE: NDArray[np.float64]) -> float:
    """Largest load over the mean, mean over layers."""
    return float(ratio_LE.max(axis=1).mean())
