"""What a description counts is what stands in the rows, whatever the row groups."""

import numpy as np
import pytest
from whole_traces import CARD, EVERYTHING, everything, write

from prefetch.trace import parquet
from prefetch.trace.card import plain_card
from prefetch.trace.describe import UNKNOWN, describe

LENGTHS = [4, 3, 70, 5, 1, 6, 2, 9]


@pytest.mark.parametrize("group_bytes", [300, 2000, 1 << 24])
def test_counts_are_those_of_the_rows(tmp_path, monkeypatch, group_bytes):
    monkeypatch.setattr(parquet, "GROUP_BYTES", group_bytes)
    trace = everything(LENGTHS)
    told = describe(write(tmp_path / "t", trace))
    assert told.lengths_R.tolist() == LENGTHS
    for row in told.table()[:-1]:
        code = -1 if row["domain"] == UNKNOWN else trace.domains.index(row["domain"])
        own_T = trace.domain_T == code
        assert row["requests"] == len(np.unique(trace.request_T[own_T]))
        assert row["prefill_tokens"] == (own_T & (trace.phase_T == 0)).sum()
        assert row["decode_tokens"] == (own_T & (trace.phase_T == 1)).sum()
    numbers = told.metrics()
    assert told.table()[-1]["tokens"] == numbers["tokens"] == 100
    assert numbers["not_executed_tokens"] == (~trace.executed_T).sum()
    assert numbers["tokens_without_id"] == (trace.token_T == -1).sum()
    assert numbers["domains"] == 2
    lengths = [numbers[f"{name}_request_tokens"] for name in ("shortest", "median", "longest")]
    assert lengths == [1, 4, 70]


def test_bytes_are_those_on_disk_by_what_they_hold(tmp_path):
    reader = write(tmp_path / "t", everything(LENGTHS), routers=True)
    told = describe(reader.folder)
    assert sum(told.bytes_of.values()) == sum(p.stat().st_size for p in reader.folder.iterdir())
    assert set(told.bytes_of) == {
        "tokens", "scores", "gate_inputs", "pre_attention", "trace.json", "router_weights.safetensors"
    }  # fmt: skip


def test_what_is_lacking_is_named(tmp_path):
    full = describe(write(tmp_path / "t", everything(LENGTHS), routers=True))
    assert set(full.lacks) == {
        "card: score_function", "card: dense_bytes", "card: kv_bytes_per_token"
    }  # fmt: skip
    card = plain_card("bare", n_experts=16, top_k=2, layer_numbers=CARD.layer_numbers)
    names = {
        f"{n}_{a}": None for n, a in zip(EVERYTHING, ("TLK", "TLM", "TLD", "TLD"), strict=True)
    }
    bare = everything(LENGTHS, card=card, token_T=-1, **names)
    lacks = describe(write(tmp_path / "u", bare)).lacks
    assert set(EVERYTHING) | {"router_weights", "token ids", "card: expert_bytes_L"} < set(lacks)
    assert "domains" not in lacks
