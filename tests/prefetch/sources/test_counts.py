"""Counts come back from every shape in which people keep them, and what is no count is refused."""

import json

import numpy as np
import pytest

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.counts import Counts
from prefetch.trace.provenance import Provenance

COUNTS_LE = np.array([[3, 0, 5, 4], [6, 2, 0, 4]])


def count(source):
    return source.count(Provenance("real", "counts"))


def layers(*, sparse=False, layers=(1, 3)):
    return {
        str(layer): {str(e): int(n) for e, n in enumerate(row) if n or not sparse}
        for layer, row in zip(layers, COUNTS_LE, strict=True)
    }


def shapes():
    locality = {
        layer: {"event_count": 6, "expert_demand_count": 12, "frequency": pairs}
        for layer, pairs in layers(sparse=True).items()
    }
    return {
        "dense": {"num_experts": 4, "expert_usage_by_layer": layers()},
        "sparse": {"num_experts": 4, "statistics": layers(sparse=True)},
        "counts": {"num_experts": 4, "counts": {"1": [3, 0, 5, 4], "3": {"0": 6, "1": 2, "3": 4}}},
        "lists": {"statistics": {"1": [3, 0, 5, 4], "3": [6, 2, 0, 4]}},
        "locality": {"all_workloads": locality, "by_family": {"chat": locality}},
    }


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


@pytest.mark.parametrize(
    ("shape", "top_k"), [("dense", 1), ("sparse", 1), ("counts", 1), ("lists", 1), ("locality", 2)]
)
def test_every_shape(tmp_path, shape, top_k):
    counts = count(Counts(path=write(tmp_path / "a.json", shapes()[shape])))
    assert counts.counts_LE.tolist() == COUNTS_LE.tolist()
    assert (counts.card.layer_numbers, counts.card.n_experts) == ((1, 3), 4)
    assert counts.card.top_k == top_k


def test_npz_family_and_sums_of_files(tmp_path):
    np.savez(tmp_path / "a.npz", counts=COUNTS_LE, layer_ids=[1, 3])
    write(tmp_path / "b.json", shapes()["dense"])
    assert (count(Counts(path=str(tmp_path), top_k=2)).counts_LE == 2 * COUNTS_LE).all()
    path = write(tmp_path / "c.json", shapes()["locality"])
    assert (count(Counts(path=path, family="chat")).counts_LE == COUNTS_LE).all()
    with pytest.raises(ConfigError, match=r"source.family=poem.*\['chat'\]"):
        count(Counts(path=path, family="poem"))


def test_assumptions_are_noted(tmp_path):
    notes = count(
        Counts(path=write(tmp_path / "a.json", {"statistics": {"1": [1, 2], "2": [1, 3]}}))
    )
    text = " ".join(notes.provenance.notes)
    assert "top_k=1" in text and "largest id + 1" in text and "unequal" in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"layer_statistics": {}}, "summaries"),
        ({"statistics": {}}, "at least one layer"),
        ({"statistics": {"1": {"0": 1, "5": 2}}}, "source.n_experts"),
        ({"statistics": {"1": {"0": -1}}}, "layer 1, expert 0: expected a whole count, got -1"),
        ({"statistics": {"1": {"0": 0.5}}}, "got 0.5"),
        ({"statistics": {"1": {"0": float("nan")}}}, "got nan"),
        ({"statistics": {"one": {"0": 1}}}, "one"),
        ({"statistics": {"1": 7}}, "JSON with expert counts"),
        ({"num_experts": 4, "statistics": {"1": {"9": 1}}}, "expert 9 is out of range for 4"),
        ({"num_experts": 2, "statistics": {"1": {"0": 0, "1": 0}}}, "every count is zero"),
        ([], "expected a JSON object"),
    ],
)
def test_what_is_no_count_is_refused(tmp_path, value, message):
    with pytest.raises(FormatError, match=rf"a\.json.*{message}"):
        count(Counts(path=write(tmp_path / "a.json", value)))


def test_totals_must_be_whole_tokens(tmp_path):
    path = write(tmp_path / "a.json", shapes()["dense"])
    with pytest.raises(
        FormatError, match=r"a\.json.*layer 1: 12 choices are no multiple of top_k=5"
    ):
        count(Counts(path=path, top_k=5))


def test_files_of_other_layers_do_not_add_up(tmp_path):
    write(tmp_path / "a.json", shapes()["dense"])
    write(tmp_path / "b.json", {"num_experts": 4, "statistics": layers(layers=(1, 5))})
    with pytest.raises(FormatError, match=r"b\.json: expected layers \[1, 3\]"):
        count(Counts(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"num_experts": "2", "counts": {"0": [1, 2]}}, "num_experts must be a whole number"),
        ({"num_experts": 2.5, "counts": {"0": [1, 2]}}, "num_experts must be a whole number"),
        ({"num_experts": 10**11, "counts": {"0": {"99999999999": 2}}}, "num_experts must be"),
        ({"counts": {"0": [1, 10**20]}}, "expected a whole count"),
        (
            {"num_experts": 4, "counts": {"0": {"0": 1, "-1": 2}}},
            "an expert cannot have the number -1",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_words(tmp_path, about, message):
    with pytest.raises(FormatError, match=message):
        count(Counts(path=write(tmp_path / "a.json", about)))


def test_top_k_of_zero_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected at least 1, got 0"):
        count(Counts(path=write(tmp_path / "a.json", shapes()["dense"]), top_k=0))


@pytest.mark.parametrize(
    "arrays",
    [
        {"counts": np.array([[-1, 2]])},
        {"counts": np.ones((2, 2), int), "layer_ids": np.array([b"a", b"b"])},
        {"counts": np.ones((2, 2), int), "layer_ids": np.array([0.5, 1])},
        {"counts": np.array(3)},
    ],
)
def test_an_npz_of_odd_numbers_is_refused_with_its_name(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FormatError, match=r"a\.npz"):
        Counts(path=str(tmp_path / "a.npz")).count(Provenance("real", "counts"))
