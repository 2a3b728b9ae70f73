"""What a guess costs, and what is said of how that was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from routing_traces import random_trace
from threadpoolctl import threadpool_info

from prefetch.predict.ensemble import Ensemble
from prefetch.predict.markov import Markov
from prefetch.predict.oracle import Oracle
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past
from prefetch.predict.predictor import parameter_bytes, resident_bytes
from prefetch.predict.route_memory import RouteMemory
from prefetch.predict.scored.timing import UNTIMED, event_time
from prefetch.predict.trajectory import Trajectory


def part() -> Part:
    return whole(random_trace(n_requests=6))


def test_single_events_have_a_tail_and_a_block_has_none() -> None:
    online = event_time(RouteMemory().fit(part(), part()), part())
    assert online.measured == "online" and online.us is not None and online.p99_us is not None
    assert 0 < online.us <= online.p99_us
    block = event_time(Markov().fit(part(), part()), part())
    assert block.measured == "block" and block.us and block.p99_us is None
    assert event_time(Oracle(), part()) == UNTIMED


@dataclass
class Threads(Markov):
    """Notes how many threads a library may use while it is asked."""

    def scores(self, past: Past) -> Any:
        self.seen = [library["num_threads"] for library in threadpool_info()]
        return super().scores(past)


def test_a_block_is_timed_on_one_thread() -> None:
    predictor = Threads().fit(part(), part())
    event_time(predictor, part())
    assert predictor.seen and set(predictor.seen) == {1}


def test_what_must_be_held_in_memory_is_more_than_what_was_learnt() -> None:
    memory = RouteMemory(window=64).fit(part(), part())
    lists = memory.memory()
    running = sum(array.nbytes for array in memory.running(3))
    beside = lists.users.nbytes + lists.offset_LE.nbytes + running
    assert resident_bytes(memory) == parameter_bytes(memory) + beside
    trajectory = Trajectory().fit(part(), part())
    maps_LEN = trajectory._maps(0, 255)
    lengths = 8 * maps_LEN.shape[0] * maps_LEN.shape[2]
    held = parameter_bytes(trajectory) + 2 * (maps_LEN.nbytes + lengths)
    assert resident_bytes(trajectory) == held
    markov = Markov().fit(part(), part())
    assert resident_bytes(markov) == parameter_bytes(markov)


def test_an_ensemble_holds_what_its_members_hold() -> None:
    one = Ensemble(members=("route_memory", "markov")).fit(part(), part())
    own = one.bias_H2_.nbytes + one.weight_H2M_.nbytes
    assert resident_bytes(one) == own + sum(map(resident_bytes, one.made_of.values()))
    assert resident_bytes(one) > parameter_bytes(one)
    assert isinstance(one.made_of["route_memory"].ids_MLK_, np.ndarray)  # type: ignore[attr-defined]
