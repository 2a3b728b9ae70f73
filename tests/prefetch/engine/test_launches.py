"""What launches of single experts add to a prediction: the engine on the fake device, whose launches cost something."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prefetch.engine.engine import Engine
from prefetch.engine.fake import FakeBackend
from prefetch.engine.replay import drive
from prefetch.engine.validating.launches import extra_ns_S
from prefetch.sim.engines.machine import no_guesses
from prefetch.sim.engines.pool import ATOMIC
from prefetch.sim.engines.run import timed_replay
from prefetch.sim.policies.lru import Lru
from tests.prefetch.engine.test_engine import WHOLE
from tests.prefetch.sim.engines.test_replay import drawn
from tests.prefetch.sim.engines.test_timed import machine_of

LAUNCH_NS = 40


class Launches(FakeBackend):
    """Every launch takes something, whatever it launches."""

    def launch(self, layer: int, tokens: Any) -> None:
        self._run("compute", LAUNCH_NS)
        super().launch(layer, tokens)


@pytest.mark.parametrize("copy_ns", [1, 30, 60, 200, 5000])
@pytest.mark.parametrize("batch", [1, 2])
def test_predictions_hold_what_single_launches_cost(copy_ns, batch):
    """From copies that hide every launch but the last to copies that hide none: exact, where an event fits."""
    work = drawn(7, n_tokens=60, batch=batch)
    whole_L = np.full(3, copy_ns)
    machine = machine_of(work, 7, issue_ns=0, predict_ns=0, staging=9, **WHOLE)
    machine = machine._replace(whole_ns_L=whole_L, chunk_ns_LX=whole_L[:, None])
    told = (work, Lru(), [8] * 3, [1, 1, 1], machine, no_guesses(), ATOMIC)
    took_S = drive(Engine(Launches(machine), 24 + 9, *told), work).timed.time_S
    n_events_S = np.add.reduceat(np.diff(work.start_V) > 0, np.arange(work.n_steps) * 3)
    said = timed_replay(work, Lru(), [8] * 3, [1, 1, 1], machine)
    first_S = n_events_S * LAUNCH_NS  # what stands before every event that has experts
    extra_S = extra_ns_S(said.outcome_A, work, machine, LAUNCH_NS)
    assert extra_S.any() == (copy_ns < 5000) and (extra_S >= -first_S).all()
    assert took_S.tolist() == (said.time_S + first_S + extra_S).tolist()


def test_with_every_expert_there_nothing_is_added():
    work = drawn(7, n_tokens=20)
    machine = machine_of(work, 7, **WHOLE)
    outcome_A = np.ones(work.n_accesses, np.uint8)
    assert not extra_ns_S(outcome_A, work, machine, LAUNCH_NS).any()
