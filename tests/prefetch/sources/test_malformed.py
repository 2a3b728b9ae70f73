"""Damaged input, of every kind and for every file source, is one error of ours that names the file; nothing is left."""

import gzip
import json
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.arrays import Arrays
from prefetch.sources.counts import Counts
from prefetch.sources.esft import Esft
from prefetch.sources.flame import Flame
from prefetch.sources.route_csv import RouteCsv
from prefetch.sources.sglang import Sglang
from prefetch.sources.specmoe import SpecMoE
from prefetch.sources.vllm import Vllm
from prefetch.trace.provenance import Provenance

E, K, T, L = 8, 2, 12, 2


def routing(seed=0):
    """(ids_TLK, weights_TLK)"""
    rng = np.random.default_rng(seed)
    ids = rng.random((T, L, E)).argsort(axis=2)[..., :K].astype(np.int32)
    return ids, np.full((T, L, K), 0.5, np.float32)


def write_arrays(path, ids, weights):
    np.savez(path, expert_ids=ids, weights=weights)


def write_parquet(path, ids, weights):
    pq.write_table(pa.table({"expert_ids": ids.tolist(), "weights": weights.tolist()}), path)


def write_esft(path, ids, weights):
    line = "\t".join(map(str, ids[:, 0].ravel())) + "\t\t"
    path.write_text(line + "\t".join(map(str, weights[:, 0].ravel())) + "\n")


def write_flame(path, ids, weights):
    pq.write_table(
        pa.table({"indices": ids[:, 0].tolist(), "scores": weights[:, 0].tolist()}), path
    )


def write_route_csv(path, ids, weights):
    preamble = "# route_trace v1\n# model=m n_layer=2 n_expert=8 n_expert_used=2\n"
    layers = "".join(f"# layer={layer} expert_bytes=9 dense_bytes=9\n" for layer in range(L))
    rows = "".join(
        f"0,1,{t},{layer},{k},{ids[t, layer, k]},{weights[t, layer, k]}\n"
        for t in range(T)
        for layer in range(L)
        for k in range(K)
    )
    path.write_text(preamble + layers + "turn,phase,step,layer,slot,expert,weight\n" + rows)


def write_vllm(path, ids, weights):
    path.write_text(json.dumps({"prompt_routed_experts": ids.tolist()}) + "\n")


def write_log(path, ids, weights):
    lines = [
        {
            "layer": la,
            "token_idx": t,
            "topk_ids": ids[t, la].tolist(),
            "topk_weights": weights[t, la].tolist(),
        }
        for t in range(T)
        for la in range(L)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sglang(path, ids, weights):
    record = {"forward_pass_id": 0, "positions": list(range(T)), "input_ids": list(range(T))}
    record |= {"extend_seq_lens": [T], "forward_mode": 1}
    record["topk_ids_of_layer"] = torch.tensor(ids.transpose(1, 0, 2).copy())
    torch.save({"records": [record]}, path)


def write_specmoe(path, ids, weights):
    fields = {"target_routing": np.full((T, E), 1 / E, np.float32), "sample_id": "a"}
    records = [{**fields, "layer_id": la, "target_top_k": ids[:, la]} for la in range(L)]
    path.write_bytes(pickle.dumps(records))


class CountsAsTrace:
    """`counts` behind the same call as the others."""

    def __init__(self, path, n_experts):
        self.source, self.real = Counts(path=path, n_experts=n_experts), True

    def record(self, writer, upstream):
        self.source.count(Provenance("real", "counts"))


def write_counts(path, ids, weights):
    counts = [np.bincount(layer.ravel(), minlength=1).tolist() for layer in ids.transpose(1, 0, 2)]
    path.write_text(json.dumps({"statistics": {str(i): row for i, row in enumerate(counts)}}))


def write_counts_npz(path, ids, weights):
    np.savez(
        path, counts=np.stack([np.bincount(a.ravel(), minlength=E) for a in ids.transpose(1, 0, 2)])
    )


# name -> (source, file, how to write it, further settings)
SOURCES = {
    "npz": (Arrays, "a.npz", write_arrays, {}),
    "parquet": (Arrays, "a.parquet", write_parquet, {}),
    "esft": (Esft, "expert_weights_1.txt", write_esft, {"top_k": K}),
    "flame": (Flame, "layer_01.parquet", write_flame, {}),
    "route_csv": (RouteCsv, "a.csv", write_route_csv, {}),
    "vllm": (Vllm, "a.jsonl", write_vllm, {}),
    "vllm log": (Vllm, "log.jsonl", write_log, {}),
    "sglang": (Sglang, "a.pt", write_sglang, {"ids": "logical"}),
    "specmoe": (SpecMoE, "a.pkl", write_specmoe, {}),
    "counts": (CountsAsTrace, "a.json", write_counts, {}),
    "counts npz": (CountsAsTrace, "a.npz", write_counts_npz, {}),
}
every_source = pytest.mark.parametrize("name", SOURCES)
TEXT = ("esft", "route_csv", "vllm", "vllm log", "counts")
WITH_WEIGHTS = ("npz", "parquet", "esft", "flame", "route_csv", "vllm log")


def source_of(name, path):
    made, _, _, settings = SOURCES[name]
    return made(path=str(path), n_experts=E, **settings)


def written(name, folder, ids=None, weights=None):
    _, file, write, _ = SOURCES[name]
    found_ids, found_weights = routing()
    path = folder / file
    write(path, found_ids if ids is None else ids, found_weights if weights is None else weights)
    return path


def refused(collect, name, path, kinds=FormatError):
    with pytest.raises(kinds) as error:
        collect(source_of(name, path))
    assert type(error.value) in (FormatError, ConfigError)
    assert path.name in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@every_source
def test_the_undamaged_file_is_accepted(collect, tmp_path, name):
    path = written(name, tmp_path)
    if name.startswith("counts"):
        source_of(name, path).record(None, {})
        return
    trace = collect(source_of(name, path)).load()
    layers = 1 if name in ("esft", "flame") else L  # a file of theirs is one layer
    np.testing.assert_array_equal(trace.ids_TLK, routing()[0][:, :layers])


@every_source
def test_truncated(collect, tmp_path, name):
    path = written(name, tmp_path)
    data = path.read_bytes()
    for share in (0.3, 0.7, 0.97):
        path.write_bytes(data[: int(len(data) * share)])
        refused(collect, name, path)


@every_source
def test_empty(collect, tmp_path, name):
    path = written(name, tmp_path)
    path.write_bytes(b"")
    refused(collect, name, path)


@every_source
def test_noise(collect, tmp_path, name):
    path = written(name, tmp_path)
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    refused(collect, name, path)


@every_source
def test_a_folder_instead_of_a_file(collect, tmp_path, name):
    path = tmp_path / SOURCES[name][1]
    path.mkdir()
    refused(collect, name, path)


@every_source
def test_no_such_file(collect, tmp_path, name):
    refused(collect, name, tmp_path / "nothing.here", ConfigError)


@every_source
def test_ids_out_of_range(collect, tmp_path, name):
    ids, _ = routing()
    ids[5, 0, 1] = E + 3
    if name == "counts npz":
        ids[5, 0, 1] = E  # one column more than the model has experts
        path = tmp_path / "a.npz"
        np.savez(path, counts=np.ones((L, E + 1), np.int64))
    else:
        path = written(name, tmp_path, ids=ids)
    said = "the file has 9" if name == "counts npz" else "out of range"
    assert said in refused(
        collect, name, path, ConfigError if name == "counts npz" else FormatError
    )


@pytest.mark.parametrize("name", [n for n in SOURCES if not n.startswith("counts")])
def test_an_expert_twice(collect, tmp_path, name):
    ids, _ = routing()
    ids[5, 0, 1] = ids[5, 0, 0]
    assert "distinct" in refused(collect, name, written(name, tmp_path, ids=ids))


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_that_are_no_numbers(collect, tmp_path, name):
    _, weights = routing()
    weights[5, 0, 1] = np.nan
    if name == "vllm log":  # Python's json writes NaN, which is not JSON
        refused(collect, name, written(name, tmp_path, weights=weights))
    else:
        assert "finite" in refused(collect, name, written(name, tmp_path, weights=weights))


@pytest.mark.parametrize("name", TEXT)
def test_mixed_encodings(collect, tmp_path, name):
    path = written(name, tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], lines[-1].decode().encode("utf-16")]))
    refused(collect, name, path)
    path.write_bytes(b"".join(lines).replace(b"1", b"\xe9", 1))  # latin1 in UTF-8
    refused(collect, name, path)


@pytest.mark.parametrize("name", ["npz", "parquet", "vllm", "vllm log", "specmoe"])
def test_files_of_another_k(collect, tmp_path, name):
    other = tmp_path / "other"
    other.mkdir()
    ids, weights = routing()
    written(name, tmp_path)
    path = written(name, other, ids=ids[..., :1], weights=weights[..., :1])
    with pytest.raises(FormatError, match=path.name):
        collect(source_of(name, tmp_path))


@pytest.mark.parametrize("name", ["parquet", "vllm", "vllm log"])
def test_rows_of_another_k(collect, tmp_path, name):
    ids = routing()[0].tolist()
    path = tmp_path / SOURCES[name][1]
    if name == "vllm log":
        written(name, tmp_path)
        lines = path.read_text().splitlines()
        row = json.loads(lines[7])
        lines[7] = json.dumps(row | {"topk_ids": row["topk_ids"][:1]})
        path.write_text("\n".join(lines) + "\n")
    else:
        ids[7][0] = ids[7][0][:1]
        if name == "parquet":
            pq.write_table(pa.table({"expert_ids": ids}), path)
        else:
            path.write_text(json.dumps({"prompt_routed_experts": ids}) + "\n")
    refused(collect, name, path)


@pytest.mark.parametrize("name", ["npz", "counts npz"])
def test_a_zip_bomb_is_not_inflated(collect, tmp_path, name):
    path = tmp_path / "a.npz"
    key = "expert_ids" if name == "npz" else "counts"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{key}.npy", npy_header((1 << 22, 4, 4)) + bytes(1 << 26))
    assert path.stat().st_size < 1 << 17
    assert "zip bomb" in refused(collect, name, path)


def npy_header(shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize("shape", [(10**15, 2, 2), (T, 10**9, 10**9), (3, 2, 2)])
def test_an_npz_whose_header_lies_about_its_size(collect, tmp_path, shape):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("expert_ids.npy", npy_header(shape) + bytes(48))
    assert "its header promises" in refused(collect, "npz", path)


def test_a_zip_whose_directory_lies_about_its_size(collect, tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("expert_ids.npy", npy_header((1 << 16, 2, 2)) + bytes(1 << 18))
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", (1 << 18) + 128), struct.pack("<I", 176)))
    refused(collect, "npz", path)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_arrays_of_objects_are_never_unpickled(collect, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    ids = np.array([[[1, 2]]], object)
    np.savez(path, expert_ids=ids) if suffix == ".npz" else np.save(path, ids, allow_pickle=True)
    refused(collect, "npz", path)


def test_arrays_whose_rows_do_not_match(collect, tmp_path):
    ids, weights = routing()
    np.savez(tmp_path / "a.npz", expert_ids=ids, weights=weights[:-1])
    assert "as many rows" in refused(collect, "npz", tmp_path / "a.npz")


@pytest.mark.parametrize(
    "ids", [np.zeros((4, 2)), np.zeros((4, 2, 2)), np.zeros((0, 2, 2), int), np.array(3)]
)
def test_arrays_that_are_no_ids(collect, tmp_path, ids):
    np.savez(tmp_path / "a.npz", expert_ids=ids)
    refused(collect, "npz", tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_other_array_formats(collect, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for data in (b"", b"\x93NUMPY", np.random.default_rng(0).bytes(999)):
        path.write_bytes(data)
        refused(collect, "npz", path)


def test_null_ids_in_parquet(collect, tmp_path):
    path = tmp_path / "a.parquet"
    for ids in ([[[0, 1]], None], [[[0, 1]], [None]], [[[0, 1]], [[0, None]]]):
        pq.write_table(pa.table({"expert_ids": ids}), path)
        refused(collect, "parquet", path)


def test_a_torch_file_with_a_foreign_class(collect, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"records": [struct.Struct]}, path)
    refused(collect, "sglang", path)


def test_a_pickle_with_a_foreign_class(collect, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([zipfile.ZipFile]))
    assert "zipfile.ZipFile" in refused(collect, "specmoe", path)


def test_gzip_that_inflates_without_end(collect, tmp_path):
    path = tmp_path / "expert_weights_1.txt.gz"
    path.write_bytes(gzip.compress(b"0\t" * (1 << 24)))
    assert "inflates" in refused(collect, "esft", path)


PICKLES = {
    "a place in memory far away": b"\x80\x04]r\xff\xff\xff\x7f.",  # the compiled unpickler makes room up to there
    "bytes without end": b"\x80\x05\x96\x00\x00\x00\x00\x04\x00\x00\x00a.",
    "a frame without end": b"\x80\x04\x95\x00\x00\x00\x00\x10\x00\x00\x00a.",
    "text without end": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x3fa.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_gets_no_room_that_it_does_not_fill(collect, tmp_path, name):
    path = tmp_path / "a.pkl"
    path.write_bytes(PICKLES[name])
    tracemalloc.start()
    try:
        assert "MemoryError" not in refused(collect, "specmoe", path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(b"x", 2**40), ([0], 2**40), ("x", 2), (2.0, 1), (-1, -1)])
def test_a_tensor_whose_sizes_are_no_whole_numbers_is_refused(collect, tmp_path, size):
    """Python's product of a text and a number is a text so many times."""
    rebuild, (storage, *_), *_ = torch.zeros(3).__reduce_ex__(2)

    class Odd:
        def __reduce__(self):
            return rebuild, (storage, 0, size, (1, 1), False, {})

    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([{"layer_id": 0, "sample_id": "a", "target_routing": Odd()}]))
    assert "expected whole numbers as its sizes" in refused(collect, "specmoe", path)


def test_a_tensor_larger_than_its_storage_is_refused(collect, tmp_path):
    path, ids = (
        tmp_path / "a.pkl",
        torch.zeros(1).expand(1 << 40),
    )  # four bytes that say they are four TiB
    record = {"layer_id": 0, "sample_id": "a", "target_routing": ids}
    path.write_bytes(pickle.dumps([record]))
    assert "does not fit its" in refused(collect, "specmoe", path)


@pytest.mark.parametrize(
    "line", [b"null\n", b" \nnull\n", b'{"layer": ' + b"[" * 100_000 + b"\n", b"[1]\n"]
)
def test_a_log_that_would_end_arrows_process_is_refused(collect, tmp_path, line):
    path = written("vllm log", tmp_path)
    rows = path.read_bytes()
    path.write_bytes(line + rows)
    refused(collect, "vllm log", path)
    path.write_bytes(rows + line)  # only what stands first may end it; a null is no row
    if b"null" not in line:
        refused(collect, "vllm log", path)


def test_a_description_may_hold_brackets(collect, tmp_path):
    path = written("vllm log", tmp_path)
    told = json.dumps({"model": "m", "layers": [[i] for i in range(200)], "note": "]]]] [[[ {{{"})
    path.write_bytes(told.encode() + b"\n" + path.read_bytes())
    assert collect(source_of("vllm log", path)).n_tokens == T


def test_a_deflated_part_of_a_torch_file_is_not_inflated(collect, tmp_path):
    path = written("sglang", tmp_path)
    with zipfile.ZipFile(path) as archive:
        parts = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert "would inflate" in refused(collect, "sglang", path)


@pytest.mark.parametrize("name", ["esft", "vllm"])
def test_a_gzip_bomb_is_counted_before_it_is_held(collect, tmp_path, name):
    path = tmp_path / ("expert_weights_1.txt.gz" if name == "esft" else "a.jsonl.gz")
    path.write_bytes(gzip.compress(b'["a", ' * (1 << 25)))
    tracemalloc.start()
    try:
        assert "inflates to more than" in refused(collect, name, path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["npz", "parquet", "esft", "flame", "vllm"])
def test_an_id_that_no_model_has_is_named_with_its_file(collect, tmp_path, name):
    ids, _ = routing()
    ids[5, 0, 1] = 70_000
    path = written(name, tmp_path, ids=ids)
    made, _, _, settings = SOURCES[name]
    with pytest.raises(FormatError) as error:  # without n_experts the ids are asked first
        collect(made(path=str(path), **settings))
    assert str(path.parent) in str(error.value)


def test_a_file_that_recorded_less_than_the_one_before_is_named(collect, tmp_path):
    ids, weights = routing()
    np.savez(tmp_path / "a.npz", expert_ids=ids, weights=weights)
    np.savez(tmp_path / "b.npz", expert_ids=ids)
    with pytest.raises(FormatError, match=r"b\.npz: every block must record the same"):
        collect(source_of("npz", tmp_path))
