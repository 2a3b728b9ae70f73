"""SGLang: passes of a batch become the requests they came from, or are refused; responses are decoded."""

import base64
import json

import numpy as np
import pytest
import torch

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.sglang import Sglang

L, K, E, SLOTS = 3, 2, 16, 8  # the recorder's buffer has eight slots; layer 0 of four is dense
EXTEND, DECODE, MIXED, VERIFY = 1, 2, 3, 5


class Server:
    """Runs requests of known routing in passes and records them as SGLang does."""

    def __init__(self, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.ids = [rng.random((n, L, E)).argsort(axis=2)[..., :K] for n in lengths]
        self.at = [0] * len(lengths)
        self.records = []

    def run(self, mode, *parts):
        """One pass; a part is (request, how many of its tokens)."""
        rows, positions, tokens = [], [], []
        for request, n in parts:
            at = self.at[request]
            rows.append(self.ids[request][at : at + n])
            positions += range(at, at + n)
            tokens += [100 * request + t for t in range(at, at + n)]
            self.at[request] += n
        topk = torch.full((L + 1, len(positions), SLOTS), -1, dtype=torch.int32)
        topk[1:, :, :K] = torch.tensor(np.concatenate(rows).transpose(1, 0, 2))
        record = {
            "forward_pass_id": len(self.records) + 5,
            "rank": 0,
            "gatherer_key": "primary",
            "input_ids": tokens,
            "positions": positions,
            "extend_seq_lens": None if mode == DECODE else [n for _, n in parts],
            "forward_mode": mode,
            "topk_ids_of_layer": topk,
            "misc_objects": [],
        }
        self.records.append(record)
        return self

    def save(self, path, **more):
        torch.save({"records": self.records, **more}, path)
        return str(path)

    def served(self):
        """A batch of three: a chunked prompt, one that ends early, one that joins late."""
        self.run(EXTEND, (0, 5), (1, 3)).run(DECODE, (0, 1), (1, 1))
        self.run(EXTEND, (2, 2)).run(DECODE, (0, 1), (1, 1)).run(EXTEND, (2, 5))
        return self.run(DECODE, (0, 1), (2, 1)).run(MIXED, (3, 2), (0, 1), (2, 1))


def rows_of(trace):
    return [trace.ids_TLK[trace.request_T == number] for number in range(trace.request_T.max() + 1)]


def test_passes_become_requests(collect, tmp_path):
    server = Server([9, 6, 10, 4]).served()
    path = server.save(tmp_path / "run.pt")
    reader = collect(Sglang(path=path, ids="logical", n_experts=E))
    trace = reader.load()
    assert (reader.card.layer_numbers, reader.card.top_k) == ((1, 2, 3), K)
    for found, ids, at in zip(rows_of(trace), server.ids, server.at, strict=True):
        np.testing.assert_array_equal(found, ids[:at])
    phases = [trace.phase_T[trace.request_T == number].tolist() for number in range(4)]
    assert phases == [[0] * 5 + [1] * 4, [0] * 3 + [1] * 2, [0] * 7 + [1] * 2, [0] * 2]
    assert trace.token_T[trace.request_T == 2].tolist() == list(range(200, 209))


def test_equal_positions_keep_the_order_of_the_batch(collect, tmp_path):
    server = Server([6, 6]).run(EXTEND, (0, 3), (1, 3))
    server.run(DECODE, (0, 1), (1, 1)).run(DECODE, (0, 1), (1, 1))
    trace = collect(Sglang(path=server.save(tmp_path / "a.pt"), ids="logical", n_experts=E)).load()
    for found, ids in zip(rows_of(trace), server.ids, strict=True):
        np.testing.assert_array_equal(found, ids[:5])


def test_a_prompt_that_the_cache_begins_is_no_chunk_of_a_request_that_decodes(collect, tmp_path):
    server = Server([20, 24]).run(EXTEND, (0, 16)).run(DECODE, (0, 1))
    server.at[1] = 16  # the first 16 tokens of request 1 came from the prefix cache
    server.run(EXTEND, (1, 4)).run(DECODE, (0, 1), (1, 1))
    trace = collect(Sglang(path=server.save(tmp_path / "a.pt"), ids="logical", n_experts=E)).load()
    assert np.bincount(trace.request_T).tolist() == [18, 5]
    assert trace.position_T[trace.request_T == 1].tolist() == list(range(16, 21))


def test_a_row_that_could_continue_two_requests_is_refused(collect, tmp_path):
    server = Server([6, 6]).run(EXTEND, (0, 3), (1, 3)).run(DECODE, (1, 1))
    with pytest.raises(FormatError, match=r"a\.pt: pass 6: 1 rows at position 3 .*\[0, 1\]"):
        collect(Sglang(path=server.save(tmp_path / "a.pt"), ids="logical", n_experts=E))


def test_physical_ids_are_translated_by_the_files_own_map_or_a_given_one(collect, tmp_path):
    server = Server([9, 6, 10, 4]).served()
    map_LP = np.stack([np.random.default_rng(layer).permutation(E) for layer in range(L + 1)])
    path = server.save(tmp_path / "own.pt", last_physical_to_logical_map=torch.tensor(map_LP))
    reader = collect(Sglang(path=path, n_experts=E))
    for found, ids, at in zip(rows_of(reader.load()), server.ids, server.at, strict=True):
        np.testing.assert_array_equal(found, map_LP[np.arange(1, L + 1)[None, :, None], ids[:at]])
    assert any("last map" in note for note in reader.provenance.notes)
    np.save(tmp_path / "map.npy", map_LP)
    path = server.save(tmp_path / "none.pt")
    source = Sglang(
        path=path, n_experts=E, ids="physical", physical_to_logical=str(tmp_path / "map.npy")
    )
    np.testing.assert_array_equal(collect(source).load().ids_TLK, reader.load().ids_TLK)
    assert set(source.files()) == {"none.pt", "map map.npy"}


def test_what_the_ids_are_must_be_known(collect, tmp_path):
    path = Server([9, 6, 10, 4]).served().save(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"a\.pt.*source.ids=logical"):
        collect(Sglang(path=path, n_experts=E))
    kept = collect(Sglang(path=path, n_experts=E, ids="physical"))
    assert any("copies" in note for note in kept.provenance.notes)
    with pytest.raises(ConfigError, match=r"source\.ids"):
        Sglang(path=path, ids="virtual")
    with pytest.raises(ConfigError, match=r"source\.ids=physical"):
        Sglang(path=path, physical_to_logical="map.npy")


def test_ranks_that_hold_copies_are_refused(collect, tmp_path):
    server = Server([9, 6, 10, 4]).served()
    server.save(tmp_path / "run_0.pt")
    server.save(tmp_path / "run_1.pt")
    with pytest.raises(FormatError, match=r"run_1\.pt: begins with the same pass as run_0\.pt"):
        collect(Sglang(path=str(tmp_path), ids="logical", n_experts=E))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("forward_mode", VERIFY, "speculative"),
        ("positions", [0], "positions"),
        ("extend_seq_lens", [1, 1], "rows"),
        ("topk_ids_of_layer", torch.zeros(4, 2, 8, dtype=torch.int32), "topk_ids_of_layer"),
        ("topk_ids_of_layer", torch.full((4, 8, 8), 10**6, dtype=torch.int32), "out of range"),
    ],
)
def test_damaged_records_are_refused(collect, tmp_path, field, value, message):
    server = Server([9, 6, 10, 4]).served()
    server.records[0][field] = value
    with pytest.raises(FormatError, match=rf"a\.pt.*pass 5.*{message}"):
        collect(Sglang(path=server.save(tmp_path / "a.pt"), ids="logical", n_experts=E))


def test_counts_without_order_are_refused(collect, tmp_path):
    torch.save({"logical_count": torch.zeros(1, L, E)}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"a\.pt.*per_token"):
        collect(Sglang(path=str(tmp_path / "a.pt"), ids="logical", n_experts=E))


P, G = 5, 4


def response(ids, form):
    data = base64.b64encode(ids.astype(np.int32).tobytes()).decode()
    usage = {"prompt_tokens": P, "completion_tokens": G, "cached_tokens": 2}
    if form == "generate":
        return {"text": "", "meta_info": {**usage, "routed_experts": data}}
    return {"choices": [{"sgl_ext": {"routed_experts": data}}], "usage": usage}


@pytest.mark.parametrize("form", ["generate", "openai"])
def test_responses(collect, tmp_path, form):
    ids = np.random.default_rng(0).random((P + G - 1, L, E)).argsort(axis=2)[..., :K]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(response(ids, form)) + "\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl.*source.ids"):
        collect(Sglang(path=str(path), n_experts=E, n_layers=L, top_k=K))
    source = Sglang(path=str(path), n_experts=E, n_layers=L, top_k=K, ids="logical")
    trace = collect(source).load()
    np.testing.assert_array_equal(trace.ids_TLK, ids)
    assert trace.executed_T.tolist() == [False] * 2 + [True] * (P + G - 3)
    assert trace.phase_T.tolist() == [0] * P + [1] * (G - 1)
    with pytest.raises(FormatError, match=r"a\.jsonl, line 1.*source.n_layers"):
        collect(Sglang(path=str(path), n_experts=E, ids="logical"))
