"""FLAME-MoE's layout: layers side by side, tokens beside them, one checkpoint at a time."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefetch.errors import ConfigError, FormatError
from prefetch.sources import flame as module
from prefetch.sources.flame import Flame

T, K, E = 23, 3, 16


def write(root, iterations=(540,), layers=(2, 3), samples=(10, 13)):
    rng = np.random.default_rng(0)
    ids_TLK = rng.random((T, len(layers), E)).argsort(axis=2)[..., :K].astype(np.int16)
    for iteration in iterations:
        for slot, layer in enumerate(layers):
            folder = root / "actives" / f"iter_{iteration:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            columns = {
                "scores": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.full(T * K, 0.125, np.float16)), K
                ),
                "indices": pa.FixedSizeListArray.from_arrays(pa.array(ids_TLK[:, slot].ravel()), K),
            }
            pq.write_table(
                pa.table(columns), folder / f"layer_{layer:02d}.parquet", row_group_size=4 + layer
            )
    (root / "samples").mkdir(exist_ok=True)
    for number, rows in enumerate(samples):
        first = sum(samples[:number])
        table = pa.table({"token_id": pa.array(np.arange(first, first + rows), pa.int32())})
        pq.write_table(table, root / "samples" / f"{number:03d}.parquet")
    return ids_TLK


@pytest.mark.parametrize("rows", [1, 6, 1 << 14])
def test_rows_tokens_and_requests(collect, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(module, "BLOCK_ROWS", rows)
    ids = write(tmp_path)
    reader = collect(Flame(path=str(tmp_path), sequence_tokens=8, n_experts=E))
    trace = reader.load("weights")
    np.testing.assert_array_equal(trace.ids_TLK, ids)
    assert trace.request_T.tolist() == [0] * 8 + [1] * 8 + [2] * 7
    assert trace.token_T.tolist() == list(range(T)) and (trace.weights_TLK == 0.125).all()
    assert reader.card.layer_numbers == (2, 3)


def test_checkpoints_are_never_mixed(collect, tmp_path):
    write(tmp_path, iterations=(540, 1080))
    with pytest.raises(ConfigError, match=r"\[540, 1080\]"):
        Flame(path=str(tmp_path)).files()
    source = Flame(path=str(tmp_path), iteration=1080, n_experts=E)
    assert sum("layer" in name for name in source.files()) == 2
    assert collect(source).card.revision == "iter_1080"


def test_one_checkpoint_without_its_tokens_and_only_the_first_rows(collect, tmp_path):
    ids = write(tmp_path)
    folder = tmp_path / "actives" / "iter_0540"
    trace = collect(Flame(path=str(folder), max_tokens=9, n_experts=E)).load()
    np.testing.assert_array_equal(trace.ids_TLK, ids[:9])
    assert (trace.token_T == -1).all()


@pytest.mark.parametrize(("samples", "word"), [((10, 12), "fewer"), ((10, 14), "more")])
def test_tokens_that_do_not_align_are_refused(collect, tmp_path, samples, word):
    write(tmp_path, samples=samples)
    with pytest.raises(FormatError, match=f"001.parquet.*{word} rows"):
        collect(Flame(path=str(tmp_path), n_experts=E))


def test_a_layer_with_fewer_rows_is_refused(collect, tmp_path):
    write(tmp_path)
    path = tmp_path / "actives" / "iter_0540" / "layer_03.parquet"
    pq.write_table(pq.read_table(path).slice(0, T - 1), path)
    with pytest.raises(FormatError, match=r"layer_03.parquet.*fewer rows"):
        collect(Flame(path=str(tmp_path), n_experts=E))
