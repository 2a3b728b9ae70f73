"""One row per activation: tokens come of top_k, and a wrong one is found."""

import numpy as np
import pytest
from router_logs import LAYERS, zipf_passes

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.llama_csv import LlamaCsv


def text_of(passes) -> str:
    rows = [
        f"{layer},{expert}\n"
        for one in passes
        for layer, ids in zip(LAYERS, one, strict=True)
        for expert in ids.ravel().tolist()
    ]
    return "layer,expert\n" + "".join(rows)


def test_tokens_are_groups_of_top_k_rows(tmp_path, collect):
    passes = zipf_passes([20, 1, 1], last=1)
    (tmp_path / "a.csv").write_text(text_of(passes))
    trace = collect(LlamaCsv(path=str(tmp_path), top_k=8, n_experts=160)).load()
    assert trace.phase_T.tolist() == [0] * 20 + [1, 1]
    np.testing.assert_array_equal(trace.ids_TLK[:20, 1], passes[0][1])
    np.testing.assert_array_equal(trace.ids_TLK[19, 3], passes[0][3][0])


def test_top_k_must_be_given_and_must_fit(tmp_path, collect):
    (tmp_path / "a.csv").write_text(text_of(zipf_passes([20])))
    with pytest.raises(ConfigError, match=r"source\.top_k=None: must be given"):
        collect(LlamaCsv(path=str(tmp_path), n_experts=160))
    with pytest.raises(
        FormatError, match=r"160 rows of layer 3 are no multiple of source\.top_k=7"
    ):
        collect(LlamaCsv(path=str(tmp_path), top_k=7, n_experts=160))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("layer,expert\n", "line 1: expected two numbers"),
        ("layer,expert\n1,2\n1,2,3\n", "line 3: expected two numbers"),
        ("a,b\n1,2\n", "line 1: expected 'layer,expert'"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, collect, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(FormatError, match=message):
        collect(LlamaCsv(path=str(tmp_path), top_k=1, n_experts=4))
