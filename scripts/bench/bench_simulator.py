"""How fast a trace is replayed, against libcachesim's own C loop over a file. Prints tables.

    python scripts/bench/bench_simulator.py

Both replay the same accesses on one thread, in turns; theirs gives a miss ratio, ours says which access hit. A drawn
trace: 20,000 tokens, 27 layers, 6 of 64 experts; one cache of each capacity per layer, then one cache for all layers.
Theirs reads the file that it reads fastest (mapped to memory, next uses written down), with a hash table that fits.
The timed engine, which also has a clock, a link and guesses, is compared with their untimed LRU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcachesim as lcs
import numpy as np
import yaml
from machine import describe

from prefetch.models.cards import load_card
from prefetch.sim.costs import machine_of
from prefetch.sim.engines.compiled import engine
from prefetch.sim.engines.machine import Guesses, no_guesses
from prefetch.sim.engines.pool import ATOMIC, SEQUENTIAL
from prefetch.sim.engines.run import events_of, prepared, timed_replay
from prefetch.sim.hardware import hardware
from prefetch.sim.limits.stacks import LruStacks, OptimalStacks, first_uses
from prefetch.sim.policies.belady_forced import BeladyForced
from prefetch.sim.policies.fifo import Fifo
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.policies.s3fifo import S3Fifo
from prefetch.sim.policies.sieve import Sieve
from prefetch.sim.policy import Policy
from prefetch.sim.sizes import lent_to
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of

PEERS: tuple[tuple[Policy, str], ...] = (
    (Lru(), "LRU"), (Fifo(), "FIFO"), (Lfu(), "LFU"), (Sieve(), "Sieve"), (S3Fifo(), "S3FIFO"),
    (BeladyForced(), "Belady"),
)  # fmt: skip
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
N_LAYERS, N_EXPERTS, TOP_K, N_TOKENS, ROUNDS = 27, 64, 6, 20_000, 5
SWEPT = (*range(8, 64, 4), 64)
RECORD = np.dtype([("ts", "<u4"), ("oid", "<u8"), ("sz", "<u4"), ("nxt", "<i8")])
FIRST_CALL = """
import time
import numpy as np
from prefetch.sim.policies.{module} import {name}
from prefetch.sim.engines.run import replay
from prefetch.sim.workload import workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of
card = plain_card("tiny", n_experts=8, top_k=2, layer_numbers=(0, 1))
work = workload_of(trace_of(card, np.zeros((4, 2, 2), np.int64) + np.arange(2)))
started = time.perf_counter()
replay(work, {name}(), [4, 4], [1, 1])
print(time.perf_counter() - started)
"""


def drawn(n_tokens: int, n_layers: int, n_experts: int, top_k: int) -> np.ndarray[Any, Any]:
    """Topics that stay for a while, experts liked by all of them, and scores that change slowly from token to token."""
    rng = np.random.default_rng(0)
    base_E = -0.5 * np.log(np.arange(1, n_experts + 1))
    liking_LE = np.stack([base_E[rng.permutation(n_experts)] for _ in range(n_layers)])
    topics = rng.normal(size=(16, n_layers, n_experts)).astype(np.float32)
    mood_LE = rng.normal(size=(n_layers, n_experts)).astype(np.float32)
    topic, ids_TLK = 0, np.empty((n_tokens, n_layers, top_k), np.uint16)
    for t in range(n_tokens):
        topic = int(rng.integers(16)) if rng.random() < 0.03 else topic
        noise = rng.standard_normal((n_layers, n_experts), dtype=np.float32)
        mood_LE = 0.8 * mood_LE + 0.6 * noise
        score_LE = liking_LE + topics[topic] + 1.2 * mood_LE
        best = np.argpartition(-score_LE, top_k, axis=1)[:, :top_k]
        order = np.argsort(-np.take_along_axis(score_LE, best, 1), axis=1)
        ids_TLK[t] = np.take_along_axis(best, order, 1)
    return ids_TLK


def work_of(ids_TLK: np.ndarray[Any, Any], n_experts: int) -> Workload:
    layers = tuple(range(ids_TLK.shape[1]))
    card = plain_card("drawn", n_experts=n_experts, top_k=ids_TLK.shape[2], layer_numbers=layers)
    return workload_of(trace_of(card, ids_TLK.astype(np.int64)))


def reader_of(path: Path, ids_A: np.ndarray[Any, Any]) -> Any:
    """What libcachesim reads fastest: fixed records with the next use of everybody."""
    order = np.argsort(ids_A, kind="stable")
    next_A = np.full(len(ids_A), np.iinfo(np.int64).max, np.int64)
    same = ids_A[order[1:]] == ids_A[order[:-1]]
    next_A[order[:-1][same]] = order[1:][same]
    records = np.zeros(len(ids_A), RECORD)
    records["oid"], records["sz"], records["nxt"] = ids_A + 1, 1, next_A
    records.tofile(path)
    return lcs.TraceReader(str(path), lcs.TraceType.ORACLE_GENERAL_TRACE)


@dataclass
class Bench:
    """One trace for both: `by_layer` has the accesses of layer 0 first, where caches are per layer."""

    work: Workload
    by_layer: Any
    by_time: Any

    def ours(self, policy: Policy, rooms: Sequence[int], semantics: int) -> Callable[[], float]:
        events = events_of(self.work, policy)
        outcome_A = np.zeros(self.work.n_accesses, np.uint8)

        def run() -> float:
            sizes = [1] * self.work.card.n_layers
            pool, actual = prepared(self.work, policy, rooms, sizes, semantics)
            engine(policy.rules).replay(events, pool, actual, outcome_A)
            return 1 - int(np.count_nonzero(outcome_A)) / self.work.n_accesses

        return run

    def theirs(self, name: str, rooms: Sequence[int]) -> Callable[[], float]:
        n_layers = self.work.card.n_layers
        per_layer = self.work.n_accesses // n_layers

        def run() -> float:
            if len(rooms) == 1:
                bits = max(8, min(16, rooms[0].bit_length() + 1))
                cache = getattr(lcs, name)(rooms[0], hashpower=bits)
                return float(cache.process_trace(self.by_time)[0])
            ratios = [
                getattr(lcs, name)(room, hashpower=8).process_trace(
                    self.by_layer, start_req=layer * per_layer, max_req=per_layer
                )[0]
                for layer, room in enumerate(rooms)
            ]
            return float(np.mean(ratios))

        return run


def seconds(run: Callable[[], float]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(rows: dict[str, Callable[[], float]]) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of every round, in turns, after one that is not counted."""
    for run in rows.values():
        run()
    taken = [[seconds(run) for run in rows.values()] for _ in range(ROUNDS)]
    return dict(zip(rows, np.array(taken).T, strict=True))


def ratio(theirs: np.ndarray[Any, Any], ours: np.ndarray[Any, Any]) -> str:
    each = theirs / ours
    return f"{np.median(each):.1f}x [{each.min():.1f}..{each.max():.1f}]"


def row(what: str, bench: Bench, policy: Policy, name: str, rooms: Sequence[int]) -> str:
    one_by_one, peer = bench.ours(policy, rooms, SEQUENTIAL), bench.theirs(name, rooms)
    both = f"{one_by_one():.4f} {peer():.4f}"
    taken = compare(
        {"theirs": peer, "ours": one_by_one, "events": bench.ours(policy, rooms, ATOMIC)}
    )
    speeds = [bench.work.n_accesses / np.median(of) / 1e6 for of in taken.values()]
    return (
        f"| {what} | {name} | {speeds[0]:.1f} | {speeds[1]:.1f} | {speeds[2]:.1f} | "
        f"{ratio(taken['theirs'], taken['ours'])} | {ratio(taken['theirs'], taken['events'])} | {both} |"
    )


def stack_rows(bench: Bench) -> list[str]:
    n_layers = bench.work.card.n_layers
    ids_LTK = bench.work.ids_A.reshape(-1, n_layers, TOP_K).swapaxes(0, 1).copy()
    class_T = np.zeros(ids_LTK.shape[1], np.uint8)
    never_E = np.full(N_EXPERTS, 2**31 - 1, np.int32)

    def lru() -> float:
        stacks = LruStacks(n_layers, N_EXPERTS, TOP_K)
        for layer in range(n_layers):
            stacks.replay(layer, ids_LTK[layer], class_T, N_EXPERTS)
        return 0.0

    def optimum() -> float:
        coming_LE = np.stack([first_uses(ids_TK, N_EXPERTS, N_EXPERTS) for ids_TK in ids_LTK])
        stacks = OptimalStacks(coming_LE)
        for layer in range(n_layers):
            stacks.replay(
                layer, ids_LTK[layer], class_T, N_EXPERTS, first_event=0, coming_E=never_E
            )
        return 0.0

    rows = []
    for what, ours, name in (("LRU", lru, "LRU"), ("optimum", optimum, "Belady")):
        sweep = [bench.theirs(name, [room] * n_layers) for room in SWEPT]
        taken = compare({"theirs": lambda s=sweep: sum(run() for run in s), "ours": ours})
        speeds = [bench.work.n_accesses / np.median(of) / 1e6 for of in taken.values()]
        rows.append(
            f"| {what}: all capacities, their {len(SWEPT)} | {speeds[0]:.1f} | {speeds[1]:.1f} | "
            f"{ratio(taken['theirs'], taken['ours'])} |"
        )
    return rows


def timed_rows(bench: Bench) -> list[str]:
    """16 per layer, sizes of DeepSeek-V2-Lite on an RTX 4090; of the guesses four in five are right."""
    card = lent_to(load_card("deepseek_v2_lite"), bench.work.card)
    fields = yaml.safe_load((CONFIGS / "hardware" / "rtx4090_pcie4.yaml").read_text())
    fields.pop("_target_")
    machine = machine_of(card, hardware(**fields), bench.work)
    rooms, sizes = [16] * N_LAYERS, [1] * N_LAYERS
    peer, rows = bench.theirs("LRU", rooms), []
    for what, guesses in (
        ("none", no_guesses()),
        ("1 layer ahead", guessed(bench.work, 1)),
        ("4 layers ahead", guessed(bench.work, 4)),
    ):

        def ours(guesses: Guesses = guesses) -> float:
            return float(
                timed_replay(bench.work, Lru(), rooms, sizes, machine, guesses).time_S.mean()
            )

        taken = compare({"theirs": peer, "ours": ours})
        speeds = [bench.work.n_accesses / np.median(of) / 1e6 for of in taken.values()]
        rows.append(
            f"| {what} | {speeds[0]:.1f} | {speeds[1]:.1f} | {ratio(taken['theirs'], taken['ours'])} |"
        )
    return rows


def guessed(work: Workload, ahead: int) -> Guesses:
    """As many as there are choices; one in five is somebody drawn."""
    rng = np.random.default_rng(0)
    ids_VW = work.ids_A.reshape(-1, TOP_K).astype(np.int32)
    drawn_VW = rng.integers(0, N_EXPERTS, ids_VW.shape, np.int32)
    ids_VW = np.where(rng.random(ids_VW.shape) < 0.8, ids_VW, drawn_VW)
    return Guesses(ids_VW, np.zeros(ids_VW.shape, np.int64), ahead)


def first_call(module: str, name: str) -> float:
    """Seconds until a fresh process has replayed a few tokens, compiled by another."""
    command = [sys.executable, "-c", FIRST_CALL.format(module=module, name=name)]
    done = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(4)]
    return float(np.median([float(process.stdout) for process in done[1:]]))


def many_entries(ids_TLK: np.ndarray[Any, Any], folder: Path) -> Bench:
    """One cache of 15,000: 60 layers of 500 experts."""
    ids = drawn(2000, 60, 500, 8)
    work = work_of(ids, 500)
    flat = ids.astype(np.int64) + np.arange(60)[:, None] * 500
    return Bench(work, None, reader_of(folder / "many", flat.ravel()))


def main() -> None:
    print(describe())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ids = drawn(N_TOKENS, N_LAYERS, N_EXPERTS, TOP_K)
        flat = ids.astype(np.int64) + np.arange(N_LAYERS)[:, None] * N_EXPERTS
        by_layer = reader_of(folder / "by_layer", flat.swapaxes(0, 1).ravel())
        by_time = reader_of(folder / "by_time", flat.ravel())
        bench = Bench(work_of(ids, N_EXPERTS), by_layer, by_time)
        print(
            "| cache | policy | theirs, M accesses/s | ours, one by one | ours, events | ratio | of events | misses |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for room in (8, 16, 32):
            for policy, name in PEERS:
                if room >= 20 or name != "S3FIFO":  # theirs aborts or never hits
                    rooms = [room] * N_LAYERS
                    print(row(f"{room} per layer", bench, policy, name, rooms), flush=True)
        for what, of, rooms in (
            ("432 of 1,728", bench, [432]),
            ("1,728 of 1,728", bench, [1728]),
            ("15,000 of 30,000", many_entries(ids, folder), [15_000]),
        ):
            for policy, name in PEERS:
                print(row(what, of, policy, name, rooms), flush=True)
        print("\n| stacks | theirs, M accesses/s | ours | ratio |\n|---|---|---|---|")
        print("\n".join(stack_rows(bench)), flush=True)
        print("\n| guesses | theirs, LRU without a clock, M accesses/s | ours, timed | ratio |")
        print("|---|---|---|---|")
        print("\n".join(timed_rows(bench)), flush=True)
    print("\n| first call in a fresh process | s |\n|---|---|")
    for module, name in (("lru", "Lru"), ("sieve", "Sieve"), ("arc", "Arc")):
        print(f"| {name} | {first_call(module, name):.2f} |", flush=True)


if __name__ == "__main__":
    main()
