"""Counts out of an importance matrix: one layer's tensors must agree, and what is no count is refused."""

import struct

import numpy as np
import pytest

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.llama_imatrix import LlamaImatrix
from prefetch.trace.provenance import Provenance

gguf = pytest.importorskip("gguf")
REAL = Provenance("real", "llama_imatrix")


def write(path, counts: dict[str, list[float]], kind: str = "imatrix") -> str:
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type(kind)
    for name, values in counts.items():
        writer.add_tensor(f"{name}.in_sum2", np.ones((len(values), 4), np.float32))
        writer.add_tensor(f"{name}.counts", np.array(values, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


GOOD = {
    "blk.1.ffn_gate_exps.weight": [5, 0, 3, 8],
    "blk.1.ffn_down_exps.weight": [5, 0, 3, 8],
    "blk.2.ffn_up_exps.weight": [4, 4, 4, 4],
    "blk.1.attn_q.weight": [16],
}


def test_counts_are_read_once_per_layer(tmp_path):
    counts = LlamaImatrix(path=write(tmp_path / "a.gguf", GOOD), top_k=2).count(REAL)
    assert counts.counts_LE.tolist() == [[5, 0, 3, 8], [4, 4, 4, 4]]
    assert counts.card.layer_numbers == (1, 2) and counts.card.top_k == 2


def test_top_k_must_be_given(tmp_path):
    with pytest.raises(ConfigError, match="top_k: must be given"):
        LlamaImatrix(path=write(tmp_path / "a.gguf", GOOD)).count(REAL)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            {**GOOD, "blk.1.ffn_up_exps.weight": [5, 0, 3, 9]},
            "differ from those of the layer's other",
        ),
        ({"blk.1.ffn_up_exps.weight": [5, 0.5]}, "expected counts, found"),
        ({"blk.1.ffn_up_exps.weight": [5, -1]}, "expected counts, found"),
        ({"blk.1.ffn_up_exps.weight": [5, float("nan")]}, "expected counts, found"),
        ({"blk.1.ffn_up_exps.weight": [5, 2**24]}, "beyond float32's exact range"),
        ({"blk.1.attn_q.weight": [7]}, "found none: no MoE model"),
        (
            {"blk.1.ffn_up_exps.weight": [5, 1], "blk.2.ffn_up_exps.weight": [5, 1, 1]},
            "same number of",
        ),
    ],
)
def test_what_is_no_count_is_refused(tmp_path, counts, message):
    path = write(tmp_path / "a.gguf", counts)
    with pytest.raises(FormatError, match=message):
        LlamaImatrix(path=path, top_k=2).count(REAL)


def test_other_files_are_refused_by_name(tmp_path):
    path = write(tmp_path / "a.gguf", GOOD, kind="model")
    with pytest.raises(FormatError, match=r"expected general\.type=imatrix"):
        LlamaImatrix(path=path, top_k=2).count(REAL)
    (tmp_path / "b.gguf").write_bytes(b"\x00" * 100)
    with pytest.raises(FormatError, match=r"expected a GGUF file; the older \.dat"):
        LlamaImatrix(path=str(tmp_path / "b.gguf"), top_k=2).count(REAL)
    cut = (tmp_path / "a.gguf").read_bytes()
    for size in (20, len(cut) // 2, len(cut) - 40):
        (tmp_path / "c.gguf").write_bytes(cut[:size])
        with pytest.raises(FormatError, match=r"c\.gguf"):
            LlamaImatrix(path=str(tmp_path / "c.gguf"), top_k=2).count(REAL)


COUNT = struct.pack("<Q", 2**40)


@pytest.mark.parametrize("at", [8, 16, 24], ids=["tensors", "keys", "the first key's length"])
def test_a_file_that_promises_without_end_is_refused_at_once(tmp_path, at):
    path = write(tmp_path / "a.gguf", GOOD)
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    data[at : at + 8] = COUNT
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=r"a\.gguf: (promises more|its description ends)"):
        LlamaImatrix(path=path, top_k=2).count(REAL)


def test_a_list_without_end_is_refused_at_once(tmp_path):
    """The library asks for each of its entries, behind the end of the file as well."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**40)
    (tmp_path / "a.gguf").write_bytes(head + key)
    with pytest.raises(FormatError, match="promises more"):
        LlamaImatrix(path=str(tmp_path / "a.gguf"), top_k=2).count(REAL)
    (tmp_path / "a.gguf").write_bytes(head + key.replace(COUNT, struct.pack("<Q", 9)))
    with pytest.raises(FormatError, match="ends behind the file"):
        LlamaImatrix(path=str(tmp_path / "a.gguf"), top_k=2).count(REAL)


def test_tensors_of_other_sizes_for_one_layer_are_refused(tmp_path):
    counts = {**GOOD, "blk.1.ffn_up_exps.weight": [5, 0, 3]}
    with pytest.raises(FormatError, match="differ from those of the layer's other"):
        LlamaImatrix(path=write(tmp_path / "a.gguf", counts), top_k=2).count(REAL)
