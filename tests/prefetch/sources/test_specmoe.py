"""specMoE's pickles: arrays and tensors come back; whatever else a pickle names is refused before it runs."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch

from prefetch.errors import FormatError
from prefetch.sources.specmoe import SpecMoE
from prefetch.sources.unpickle import unpickle

LAYERS, E = (1, 3, 5), 8


@dataclasses.dataclass
class GatingRecord:
    """As the Qwen shards have it; the reader never imports it."""

    layer_id: int
    target_routing: object
    target_top_k: object
    sample_id: str
    dataset_name: str = "qwen"


def scores(lengths, seed=0):
    logits = np.random.default_rng(seed).normal(size=(sum(lengths), len(LAYERS), E)) * 3
    return np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)


def records(score_TLE, lengths, kind=np.asarray):
    found, first = [], 0
    for number, length in enumerate(lengths):
        part = score_TLE[first : first + length].astype(np.float32)
        first += length
        found += [
            {
                "layer_id": layer,
                "hidden_states": kind(np.zeros((length, 4), np.float32)),
                "input_embeddings": kind(np.arange(length)),
                "target_routing": kind(part[:, slot]),
                "target_top_k": kind(part[:, slot].argmax(axis=1)[:, None]),
                "prev_layer_gates": [],
                "sequence_length": length,
                "token_ids": None,
                "dataset_name": f"set{number % 2}",
                "sample_id": f"set_{number}",
            }
            for slot, layer in enumerate(LAYERS)
        ]
    return found


def write(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return str(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_what_is_written_comes_back(collect, tmp_path, kind, protocol):
    lengths = (4, 9)
    score_TLE = scores(lengths)
    path = write(tmp_path / "a.pkl", records(score_TLE, lengths, kind), protocol)
    reader = collect(SpecMoE(path=path))
    trace = reader.load("scores")
    np.testing.assert_array_equal(trace.ids_TLK[..., 0], score_TLE.argmax(axis=2))
    np.testing.assert_allclose(trace.scores_TLM, score_TLE, atol=5e-4)  # float16 below 1
    assert reader.card.layer_numbers == LAYERS and set(reader.card.layer_stacks) == {"encoder"}
    assert (reader.card.n_experts, reader.card.top_k) == (E, 1)
    assert trace.token_T.tolist() == [*range(4), *range(9)] and reader.domains == ("set0", "set1")
    assert reader.provenance.facts["first_choice_is_best_score"] == 1.0


def test_logits_become_probabilities(collect, tmp_path):
    score_TLE = scores((6,))
    path = write(tmp_path / "a.pkl", records(np.log(score_TLE), (6,)))
    reader = collect(SpecMoE(path=path, stack="decoder"))
    np.testing.assert_allclose(reader.load("scores").scores_TLM, score_TLE, atol=5e-4)
    assert any("softmax was applied" in note for note in reader.provenance.notes)


def test_a_named_record_class_is_read_as_plain_fields(collect, tmp_path):
    score_TLE = scores((6,)).astype(np.float32)
    best = np.argsort(-score_TLE, axis=2)[..., :2]
    found = [
        GatingRecord(
            layer, torch.tensor(score_TLE[None, :, slot]), torch.tensor(best[None, :, slot]), "a"
        )
        for slot, layer in enumerate(LAYERS)
    ]
    path = write(tmp_path / "a.pkl", found)
    name = f"{GatingRecord.__module__}.GatingRecord"
    with pytest.raises(FormatError, match=f"a.pkl: the pickle names {name}.*refused"):
        collect(SpecMoE(path=path))
    trace = collect(SpecMoE(path=path, record_class=name)).load()
    np.testing.assert_array_equal(trace.ids_TLK, best)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_foreign_name_is_refused_and_nothing_of_it_runs(tmp_path, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    write(path, [{"layer_id": Evil()}], protocol)
    with pytest.raises(FormatError, match=r"evil\.pkl: the pickle names (posix|nt)\.mkdir"):
        unpickle(path)
    assert not (tmp_path / "ran").exists()
    name = f"{os.mkdir.__module__}.mkdir"  # even when it is claimed to be a record
    with pytest.raises(FormatError, match=r"evil\.pkl"):
        unpickle(path, record_class=name)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_cannot_smuggle_a_pickle_of_its_own(tmp_path, monkeypatch):
    """torch's storage loader would unpickle its bytes without restriction."""
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Evil(), protocol=2)
    outer = (
        b"\x80\x04ctorch.storage\n_load_from_bytes\nB"
        + len(inner).to_bytes(4, "little")
        + inner
        + b"\x85R."
    )
    (tmp_path / "a.pkl").write_bytes(outer)
    with pytest.raises(FormatError, match=r"a\.pkl"):
        unpickle(tmp_path / "a.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.ones((2, 3))),
        np.array(["a", "bc"]),
        np.float32(3),
        b"abc",
        {1: (2.5, [None])},
    ],
)
def test_plain_values_and_numpy_survive(tmp_path, value):
    for protocol in (2, 5):
        write(tmp_path / "a.pkl", value, protocol)
        np.testing.assert_array_equal(unpickle(tmp_path / "a.pkl"), value)


def changed(n, **fields):
    found = records(scores((4, 9)), (4, 9))
    found[n] |= fields
    return found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "expected a list of records, found dict"),
        ([], "expected a list of records"),
        ([{"layer_id": 1}], r"record 0: lacks \['sample_id', 'target_routing'\]"),
        (changed(1, layer_id=1), "layer 1 of sample set_0 stands twice"),
        (
            changed(4, layer_id=7),
            r"sample set_1: expected records of layers \[1, 3, 5\], got \[1, 5, 7\]",
        ),
        (changed(4, target_routing=np.ones((3, E))), "sample set_1: expected target_routing"),
        (
            changed(4, target_routing=np.full((9, E), np.nan)),
            "sample set_1: target_routing: expected finite",
        ),
        (changed(4, target_routing="text"), "sample set_1: target_routing: expected numbers"),
        (changed(4, target_top_k=np.full((9, 1), 99)), "sample set_1: .*99 is out of range"),
        (changed(4, token_ids=np.zeros(9, int)), "sample set_1: token_ids"),
    ],
)
def test_records_that_do_not_fit_are_refused(collect, tmp_path, value, message):
    with pytest.raises(FormatError, match=rf"a\.pkl.*{message}"):
        collect(SpecMoE(path=write(tmp_path / "a.pkl", value)))


class RawObjects:
    """An array of objects over raw bytes: the bytes would be used as pointers."""

    def __reduce__(self):
        return np.ndarray, ((1,), np.dtype("O"), b"AAAAAAAA")


class LyingDtype:
    """A dtype with an object field whose own flags deny it."""

    def __reduce__(self):
        fields = {"a": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0)


class RawBuffer:
    def __reduce__(self):
        from_buffer = np.zeros(1).__reduce_ex__(5)[0]
        return from_buffer, (b"AAAAAAAA", LyingDtype(), (1,), "C")


@pytest.mark.parametrize(
    "value",
    [
        RawObjects(),
        RawBuffer(),
        LyingDtype(),
        np.array([1, "a", None], object),
        np.zeros(1, "i4,f4"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_an_array_that_is_not_plain_numbers_is_refused(tmp_path, value, protocol):
    write(tmp_path / "a.pkl", [{"sample_id": value}], protocol)
    with pytest.raises(FormatError, match=r"a\.pkl"):
        unpickle(tmp_path / "a.pkl")
