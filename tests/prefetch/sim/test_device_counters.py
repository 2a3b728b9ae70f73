"""Under `overshoot` the replay is a real device's cache: each of its lookups, and the tables of other policies.

Recordings and tables: Helldez/BigMoeOnEdge at 2d4f2b1. The table was made by its replay script, not by the device.
"""

from __future__ import annotations

import csv
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from prefetch.sim.engines.compiled import engine
from prefetch.sim.engines.pool import HIT, OVERSHOOT
from prefetch.sim.engines.run import events_of, prepared, replay
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.belady_forced import BeladyForced
from prefetch.sim.policies.lfu_persistent import LfuPersistent
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policy import Policy
from prefetch.sim.workload import Workload, workload_of
from prefetch.sources.route_csv import RouteCsv, Turn, read_preamble, turns
from prefetch.trace.routing import DECODE

MIB = 1 << 20
HALF = 0.05  # the table has one decimal
RECORDED = {"qwen": 4000, "gptoss": 3000}  # MiB, the budget that the device ran with
BUDGETS = {"qwen": (500, 1000, 2000, 3000, 4000), "gptoss": (750, 1000, 2000, 3000, 4000)}  # MiB
TABLE = {  # hits per 100 lookups of generated tokens, after the prompt has warmed the cache
    ("qwen", "global", Lru()): (0.0, 37.7, 56.5, 70.6, 80.3),
    ("qwen", "global", LfuPersistent()): (26.6, 40.2, 58.6, 71.3, 80.8),
    ("qwen", "global", BeladyForced()): (45.3, 62.7, 79.4, 87.8, 92.7),
    ("qwen", "per_layer", Lru()): (38.3, 42.3, 59.4, 71.1, 79.7),
    ("qwen", "per_layer", LfuPersistent()): (38.3, 45.1, 63.3, 74.2, 81.7),
    ("gptoss", "global", Lru()): (0.0, 17.7, 30.9, 44.8, 51.7),
    ("gptoss", "global", LfuPersistent()): (18.7, 23.3, 35.0, 43.6, 49.8),
    ("gptoss", "global", BeladyForced()): (37.2, 43.5, 59.9, 67.8, 73.0),
    ("gptoss", "per_layer", Lru()): (19.1, 19.1, 34.5, 45.9, 52.1),
    ("gptoss", "per_layer", LfuPersistent()): (19.1, 19.1, 34.2, 44.5, 50.8),
}
Recorded = Callable[[str], tuple[Workload, Turn, list[dict[str, int | float]]]]


@pytest.fixture
def recorded(collect, real_data) -> Recorded:
    """What was routed, what the engine wrote of every lookup, and its counters after every generated token."""

    def load(name: str) -> tuple[Workload, Turn, list[dict[str, int | float]]]:
        folder = real_data / "traces" / "big-moe-on-edge"
        path = folder / f"{name}.route.csv"
        n_lines, _, columns = read_preamble(path)
        (turn,) = turns(path, n_lines, columns)
        lines = (folder / f"{name}.metrics").read_text().splitlines()
        rows = csv.DictReader(line for line in lines if line and not line.startswith("#"))
        counters = [{key: float(value) for key, value in row.items()} for row in rows]
        return workload_of(collect(RouteCsv(path=str(path))).load()), turn, counters

    return load


def rooms(work: Workload, n_bytes: int, scope: str = "global") -> list[int]:
    n_layers = work.card.n_layers
    return [n_bytes] if scope == "global" else [n_bytes // n_layers] * n_layers


def hits(work: Workload, policy: Policy, room_G: list[int]) -> NDArray[np.bool_]:
    """[A]. Every expert has the size that the recording gives its layer."""
    assert work.card.expert_bytes_L is not None
    return replay(work, policy, room_G, work.card.expert_bytes_L, OVERSHOOT) == HIT


def steps_and_layers(work: Workload) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[A] of every access."""
    event_A = np.repeat(np.arange(len(work.start_V) - 1), np.diff(work.start_V))
    step_A, layer_A = np.divmod(event_A, work.card.n_layers)
    return step_A, layer_A


def missed_bytes(work: Workload, hit_A: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[S]"""
    assert work.card.expert_bytes_L is not None
    step_A, layer_A = steps_and_layers(work)
    size_A = np.array(work.card.expert_bytes_L)[layer_A]
    return np.bincount(step_A, np.where(hit_A, 0, size_A)).astype(np.int64)


@pytest.mark.parametrize(("name", "scope", "policy"), list(TABLE))
def test_published_table(recorded, name, scope, policy):
    work, _, _ = recorded(name)
    step_A, _ = steps_and_layers(work)
    counted_A = work.is_decode_S[step_A]
    found = [
        100 * hits(work, policy, rooms(work, budget * MIB, scope))[counted_A].mean()
        for budget in BUDGETS[name]
    ]
    np.testing.assert_allclose(found, TABLE[name, scope, policy], atol=HALF)


@pytest.mark.parametrize("name", RECORDED)
def test_a_way_around_the_cache_is_none_where_the_batch_stays(recorded, name):
    """The published Belady has no bypass; `overshoot` never lets go of the batch, so ours has none either."""
    work, _, _ = recorded(name)
    for budget in BUDGETS[name]:
        room_G = rooms(work, budget * MIB)
        np.testing.assert_array_equal(
            hits(work, Belady(), room_G), hits(work, BeladyForced(), room_G)
        )


@pytest.mark.parametrize(("name", "n_lookups"), [("qwen", 36_864), ("gptoss", 4_608)])
def test_every_lookup_of_a_generated_token_hits_where_the_device_hit(recorded, name, n_lookups):
    work, turn, _ = recorded(name)
    hit_A = hits(work, Lru(), rooms(work, RECORDED[name] * MIB))
    step_A, layer_A = steps_and_layers(work)
    ours_A, theirs_N = work.is_decode_S[step_A], turn["phase"] == DECODE
    assert ours_A.sum() == theirs_N.sum() == n_lookups
    np.testing.assert_array_equal(layer_A[ours_A], turn["layer"][theirs_N])
    np.testing.assert_array_equal(work.ids_A[ours_A], turn["expert"][theirs_N])
    np.testing.assert_array_equal(hit_A[ours_A], turn["residency"][theirs_N] == 1)


@pytest.mark.parametrize(
    ("name", "n_tokens", "n_unique", "final"),
    [("qwen", 128, 2_662, 74.88), ("gptoss", 64, 1_767, 32.41)],
)
def test_cumulative_hit_rate_after_every_token(recorded, name, n_tokens, n_unique, final):
    """Two decimals there, prompt included: an expert that several tokens of the prompt need is looked up once."""
    work, _, counters = recorded(name)
    hit_A = hits(work, Lru(), rooms(work, RECORDED[name] * MIB))
    step_A, _ = steps_and_layers(work)
    lookups_S, hits_S = np.bincount(step_A), np.bincount(step_A, hit_A)
    rate_S = 100 * hits_S.cumsum() / lookups_S.cumsum()
    assert (len(counters), lookups_S[0], hits_S[0]) == (n_tokens, n_unique, 0)
    theirs = [row["cache_hit_pct"] for row in counters]
    np.testing.assert_allclose(rate_S[1:], theirs, atol=0.00501)
    assert rate_S[-1] == pytest.approx(final, abs=0.005)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("qwen", 12_282, 12_288), ("gptoss", 7_603, 13_806)]
)
def test_bytes_read_for_every_token(recorded, name, least, most):
    """Reads are aligned to 4 KiB: up to so many bytes more than the expert has, in the mean of a token's misses."""
    work, turn, counters = recorded(name)
    hit_A = hits(work, Lru(), rooms(work, RECORDED[name] * MIB))
    bytes_S = missed_bytes(work, hit_A)
    place_N = np.unique(turn["step"][turn["phase"] == DECODE], return_inverse=True)[1]
    written_S = np.bincount(place_N, turn["expert_bytes"][turn["phase"] == DECODE])
    np.testing.assert_array_equal(bytes_S[1:], written_S)
    assert bytes_S.sum() == turn["expert_bytes"].sum()  # the prompt's too
    misses_S = np.bincount(steps_and_layers(work)[0], ~hit_A)[1:]
    extra_S = [row["read_bytes"] for row in counters] - bytes_S[1:]
    assert (extra_S >= least * misses_S).all() and (extra_S <= most * misses_S).all()


@pytest.mark.parametrize(("name", "resident_mib"), [("qwen", 3997.7), ("gptoss", 2987.8)])
def test_bytes_that_are_resident_at_the_end(recorded, name, resident_mib):
    work, _, _ = recorded(name)
    room_G = rooms(work, RECORDED[name] * MIB)
    sizes = work.card.expert_bytes_L
    pool, semantics = prepared(work, Lru(), room_G, sizes, OVERSHOOT)
    outcome_A = np.zeros(work.n_accesses, np.uint8)
    engine(Lru.rules).replay(events_of(work, Lru()), pool, semantics, outcome_A)
    resident = (pool.room_G - pool.left_G).sum() / MIB
    assert resident == pytest.approx(resident_mib, abs=0.05)
