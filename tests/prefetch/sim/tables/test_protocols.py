"""Published protocols: each does what it is said to do, on paper; and on one workload they stand in their order."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sticky_workloads import sticky

from prefetch import config
from prefetch.artifacts import Store
from prefetch.runs.outputs import Outputs
from prefetch.sim.engines.machine import Guesses
from prefetch.sim.engines.pool import EMPTY, HIT, SEQUENTIAL
from prefetch.sim.engines.run import replay
from prefetch.sim.evaluate import run
from prefetch.sim.policies.lru import Lru
from prefetch.sim.tables import protocols
from prefetch.sim.workload import Workload, workload_of
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of
from prefetch.tracking import NoTracker


def two_layers(*tokens: tuple[tuple[int, ...], tuple[int, ...]]) -> Workload:
    card = plain_card("paper", n_experts=4, top_k=2, layer_numbers=(0, 1))
    return workload_of(trace_of(card, np.array(tokens)))


def told(work: Workload, *ids: tuple[int, ...]) -> Guesses:
    ids_VW = np.array(ids, np.int32)
    assert len(ids_VW) == work.n_steps * work.card.n_layers
    return Guesses(ids_VW, np.zeros(ids_VW.shape, np.int64), 1)


def test_one_lru_over_all_layers_on_paper():
    """Four places, four uses per token: the second token finds all, the third nothing of layer 1's new ones."""
    work = two_layers(((0, 1), (2, 3)), ((0, 1), (2, 3)), ((2, 1), (2, 0)))
    found = protocols.one_by_one(work, None, 4, seed=0)[4:]
    assert found.tolist() == [True] * 4 + [False, True, True, False]


@pytest.mark.parametrize("slots", [1, 30, 100, 200])
def test_it_is_the_sequential_lru_but_for_what_was_drawn_at_first(slots):
    """Who was drawn can only be a hit before its first use; and below one token's uses nothing else is."""
    work = sticky(0, 60, 4, n_experts=64, top_k=6)
    ours = protocols.one_by_one(work, None, slots, seed=1)
    theirs = replay(work, Lru(), [slots], [1] * 4, SEQUENTIAL) == HIT
    layer_A = np.repeat(np.arange(work.n_steps * 4) % 4, np.diff(work.start_V))
    entry_A = layer_A * 64 + work.ids_A
    is_first_A = np.zeros(work.n_accesses, bool)
    is_first_A[np.unique(entry_A, return_index=True)[1]] = True
    np.testing.assert_array_equal(ours[~is_first_A], theirs[~is_first_A])
    assert not theirs[is_first_A].any()
    if slots == 1:
        assert not theirs.any()


def test_guesses_are_put_in_for_nothing_and_push_others_out():
    """Two places: true guesses hit every time; wrong ones leave room for nobody."""
    work = two_layers(((0, 1), (2, 3)), ((0, 1), (2, 3)))
    true = told(work, (0, 1), (2, 3), (0, 1), (2, 3))
    assert protocols.one_by_one(work, true, 2, seed=0).all()
    alone = protocols.one_by_one(work, None, 4, seed=0)[4:]
    wrong = told(work, (2, 3), (0, 1), (2, 3), (0, 1))
    assert alone.all() and not protocols.one_by_one(work, wrong, 4, seed=0)[4:].any()
    nobody = told(work, *((EMPTY, EMPTY),) * 4)
    assert protocols.one_by_one(work, nobody, 4, seed=0)[4:].all()


def test_a_guess_beside_the_cache_is_a_hit_whoever_is_in_it():
    work = two_layers(((0, 1), (2, 3)), ((3, 1), (2, 0)))
    some = told(work, (1, EMPTY), (0, 1), (1, 3), (EMPTY, 0))
    assert protocols.guessed(work, some).tolist() == [
        False, True, False, False, True, True, False, True
    ]  # fmt: skip


def test_the_most_used_of_each_layer_stay():
    work = two_layers(((0, 1), (2, 3)), ((3, 1), (2, 0)))
    uses_LE = np.array([[1, 2, 0, 1], [1, 0, 2, 1]])
    assert protocols.stays(work, uses_LE, 1).tolist() == [
        False, True, True, False, False, True, True, False
    ]  # fmt: skip


def test_the_first_tokens_of_a_request_are_known_by_their_position():
    card = plain_card("paper", n_experts=4, top_k=2, layer_numbers=(0,))
    ids_TLK = np.tile(np.array([[[0, 1]]]), (5, 1, 1))
    trace = trace_of(card, ids_TLK, request_T=np.array([0, 0, 0, 1, 1]))
    work = workload_of(trace)
    assert protocols.after_first(work, trace.position_T, 2).tolist() == [0, 0, 1, 0, 0]


def test_without_a_generated_token_the_summary_says_so_and_shows_no_nan():
    row = {"capacity": "0.25", "predictor": "none", "protocol": protocols.OURS, "mark": ""}
    rates = {"hit_rate": float("nan"), "honest_hit_rate": float("nan"), "flattered_points": 0.0}
    said = protocols.in_words(pd.DataFrame([{**row, **rates}]))
    assert "none was replayed" in said and "nan" not in said


def test_the_table_compares_the_same_guesses(tmp_path, caplog):
    """An instant link and places of their own can only help; the tested tokens' own counts are the best static."""
    from hydra import compose, initialize_config_dir

    words = (
        "stage=evaluate", "source=synthetic", "source.n_requests=12", "source.prompt_tokens=6", "source.new_tokens=20",
        "source.n_layers=4", "source.n_experts=8", "source.top_k=2", "simulator.model_card=mixtral_8x7b",
        "train.horizons=[1]", "simulator.horizon=1", "evaluate.required_recall=false", "predictor=markov",
        "evaluate.predictors=[markov,oracle,gate_lookahead]", "evaluate.capacities=[0.25,0.5]",
        "evaluate.protocols=true",
    )  # fmt: skip
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=[*words, f"store={tmp_path / 'store'}"])
    run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(tmp_path / "out", NoTracker()))
    table = pd.read_parquet(tmp_path / "out" / "protocols.parquet")
    by = table.set_index(["capacity", "predictor", "protocol"]).hit_rate
    for capacity in ("0.25", "0.5"):
        for name in ("markov", "oracle"):
            ours = by[capacity, name, protocols.OURS]
            assert by[capacity, name, protocols.INSTANT] > ours
            assert by[capacity, name, protocols.BESIDE] >= by[capacity, "none", protocols.OURS]
        assert by[capacity, "oracle", protocols.BESIDE] == 1
        assert by[capacity, "none", protocols.TESTED] >= by[capacity, "none", protocols.TRAINED]
    assert set(table.predictor) == {"none", "markov", "oracle"}, (
        "one that cannot run stops no other"
    )
    assert (
        "no published protocols of gate_lookahead at cache 0.25: needs gate_inputs" in caplog.text
    )
    assert set(table[table.predictor == "oracle"]["mark"]) == {"cheats"}
    assert set(table[table.protocol == protocols.TESTED]["mark"]) == {"cheats"}
    said = (tmp_path / "out" / "summary.md").read_text()
    assert "## By published protocols" in said and said.count(f"| {protocols.INSTANT} |") == 4
    assert Path(tmp_path / "out" / "published_protocols.png").stat().st_size > 10_000
