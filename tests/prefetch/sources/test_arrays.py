"""The same routing comes back from npz, npy, safetensors and Parquet, whatever the names and the size of a block."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from prefetch.errors import ConfigError, FormatError
from prefetch.sources import arrays as module
from prefetch.sources.arrays import Arrays
from prefetch.trace.routing import no_expert

L, K, E = 3, 2, 16
REQUEST = np.repeat([7, 3, 9], [5, 1, 6])


@pytest.fixture
def routing():
    rng = np.random.default_rng(0)
    ids = rng.random((12, L, E)).argsort(axis=2)[..., :K].astype(np.int16)
    return {"ids": ids, "weights": rng.random((12, L, K)).astype(np.float32)}


def nested(array):
    column = pa.array(array.ravel())
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, int(size))
    return column


def save(path, columns):
    if path.suffix == ".npz":
        np.savez_compressed(path, **columns)
    elif path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(a) for name, a in columns.items()}, path)
    else:
        table = {n: nested(a) if a.ndim > 1 else pa.array(a) for n, a in columns.items()}
        pq.write_table(pa.table(table), path, row_group_size=5)


@pytest.mark.parametrize("rows", [1, 4, 1 << 14])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_every_format_and_block_size_gives_the_same(
    collect, tmp_path, routing, suffix, rows, monkeypatch
):
    monkeypatch.setattr(module, "BLOCK_ROWS", rows)
    path = tmp_path / f"law{suffix}"
    columns = {"topk_ids": routing["ids"], "gate_weights": routing["weights"], "seq_id": REQUEST}
    save(path, {**columns, "token_id": np.arange(12)})
    reader = collect(Arrays(path=str(path), n_experts=E))
    trace = reader.load("weights")
    np.testing.assert_array_equal(trace.ids_TLK, routing["ids"])
    np.testing.assert_array_equal(trace.weights_TLK, routing["weights"].astype(np.float16))
    assert trace.request_T.tolist() == [0] * 5 + [1] + [2] * 6
    assert trace.position_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]
    assert trace.token_T.tolist() == list(range(12)) and trace.domains == ("law",)


def test_a_npy_is_one_request_and_minus_one_is_no_expert(collect, tmp_path, routing):
    ids = routing["ids"].copy()
    ids[4, 1] = -1
    np.save(tmp_path / "a.npy", ids)
    trace = collect(Arrays(path=str(tmp_path), n_experts=E, default_phase="decode")).load()
    assert (trace.ids_TLK[4, 1] == no_expert(E)).all() and trace.phase_T.all()
    assert not trace.request_T.any()


def test_another_number_may_mean_no_expert(collect, tmp_path, routing):
    ids = routing["ids"].astype(np.uint8)
    ids[0] = 255
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(FormatError, match=r"a\.npy.*255 is out of range"):
        collect(Arrays(path=str(tmp_path / "a.npy"), n_experts=E))
    trace = collect(Arrays(path=str(tmp_path / "a.npy"), n_experts=E, no_expert=255)).load()
    assert (trace.ids_TLK[0] == no_expert(E)).all()


def test_names_and_flat_ids_by_option(collect, tmp_path, routing):
    np.savez(tmp_path / "a.npz", mine=routing["ids"].reshape(12, -1), layers=[2, 4, 6])
    source = Arrays(path=str(tmp_path), names={"expert_ids": "mine"}, top_k=K, n_experts=E)
    reader = collect(source)
    assert reader.card.layer_numbers == (2, 4, 6)
    np.testing.assert_array_equal(reader.load().ids_TLK, routing["ids"])


@pytest.mark.parametrize("phase", [np.array([0, 1] * 6), np.array(["prefill", "decode"] * 6)])
def test_phases_as_numbers_and_as_words(collect, tmp_path, routing, phase):
    np.savez(tmp_path / "a.npz", expert_ids=routing["ids"], phase=phase)
    assert collect(Arrays(path=str(tmp_path), n_experts=E)).load().phase_T.tolist() == [0, 1] * 6


def test_parquet_with_plain_lists(collect, tmp_path, routing):
    pq.write_table(pa.table({"experts": routing["ids"].tolist()}), tmp_path / "a.parquet")
    trace = collect(Arrays(path=str(tmp_path), n_experts=E)).load()
    np.testing.assert_array_equal(trace.ids_TLK, routing["ids"])


def test_the_number_of_experts_is_inferred_only_where_every_id_occurs(collect, tmp_path):
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(4), (20, 1, 1)), axis=2)[..., :2]
    np.save(tmp_path / "a.npy", ids)
    reader = collect(Arrays(path=str(tmp_path / "a.npy")))
    assert reader.card.n_experts == 4
    assert any("largest id" in note for note in reader.provenance.notes)
    np.save(tmp_path / "b.npy", np.where(ids == 3, 9, ids))
    with pytest.raises(FormatError, match=r"b.npy.*6 smaller ids never occur"):
        collect(Arrays(path=str(tmp_path / "b.npy")))


def test_rows_of_a_request_that_stand_apart_are_refused(collect, tmp_path, routing):
    np.savez(tmp_path / "a.npz", expert_ids=routing["ids"], request=[0] * 5 + [1] * 5 + [0] * 2)
    with pytest.raises(FormatError, match=r"a.npz.*request 0.*sort"):
        collect(Arrays(path=str(tmp_path), n_experts=E))


def test_impossible_options():
    with pytest.raises(ConfigError, match="default_phase"):
        Arrays(path="x", default_phase="both")
    with pytest.raises(ConfigError, match="names"):
        Arrays(path="x", names={"expert": "ids"})


def routed(n_tokens: int, n_layers: int = 4, seed: int = 0):
    return np.random.default_rng(seed).random((n_tokens, n_layers, 16)).argsort(-1)[..., :2]


def test_a_domain_column_counts_and_what_is_not_read_is_said(tmp_path, collect):
    domain = np.array(["law"] * 30 + ["code"] * 30)
    np.savez(tmp_path / "a.npz", topk_indices=routed(60), domain=domain, is_odd=domain == "law")
    reader = collect(Arrays(path=str(tmp_path / "a.npz"), n_experts=16))
    trace = reader.load()
    assert [trace.domains[code] for code in trace.domain_T] == domain.tolist()
    assert "not read: is_odd" in reader.provenance.notes


def test_layers_first_is_not_taken_for_tokens_first(tmp_path, collect):
    np.save(tmp_path / "a.npy", routed(300).transpose(1, 0, 2))
    with pytest.raises(FormatError, match="4 tokens of 300 layers look transposed"):
        collect(Arrays(path=str(tmp_path / "a.npy"), n_experts=16))


def test_positions_above_zero_hint_at_decode(tmp_path, collect):
    np.savez(tmp_path / "a.npz", expert_ids=routed(40), pos=np.arange(40) + 17)
    notes = collect(Arrays(path=str(tmp_path / "a.npz"), n_experts=16)).provenance.notes
    assert any("source.default_phase=decode" in note for note in notes)


def test_a_file_without_any_expert_is_refused(tmp_path, collect):
    np.save(tmp_path / "a.npy", np.full((40, 4, 2), -1))
    with pytest.raises(FormatError, match="found no expert at all"):
        collect(Arrays(path=str(tmp_path / "a.npy")))


def test_one_row_per_token_and_layer_is_not_taken_for_one_layer(tmp_path, collect):
    flat = routed(64).reshape(-1, 2)
    np.savez(tmp_path / "a.npz", expert_ids=flat, layer=np.tile(np.arange(4), 64))
    with pytest.raises(FormatError, match="one row per token and layer"):
        collect(Arrays(path=str(tmp_path / "a.npz"), n_experts=16, top_k=2))
