"""The dump of llama-eval-callback: whole ones are read, elided and cut ones are refused."""

import numpy as np
import pytest
from router_logs import zipf_passes

from prefetch.errors import FormatError
from prefetch.sources.llama_eval_callback import LlamaEvalCallback

LAYERS = (1, 2)


def tensor(name: str, kind: str, rows: np.ndarray, number: str, elide: bool = False) -> str:
    n, k = rows.shape
    body = "".join(
        f"      [{', '.join(format(x, number) for x in row)}{', ...' if elide else ''}],\n"
        for row in rows.tolist()
    )
    shape = f"{k}, {n}, 1, 1" if kind == "i32" else f"1, {k}, {n}, 1"
    origin = f"VIEW({name.replace('topk', 'argsort')}{{16, {n}, 1, 1}}, }})"
    return (
        f"common_debug_cb_eval:   {name} = ({kind})  {origin} = {{{shape}}}\n    [\n     [\n{body}     ],\n    ]\n"
        f"    sum = {rows.sum():f}\n"
    )


def dump(passes, weights: bool = True, **options) -> str:
    text = "llama_context: n_ctx = 512\n"
    for one in passes:
        for layer, rows in zip(LAYERS, one, strict=True):
            text += tensor(f"ffn_moe_logits-{layer}", "f32", rows * 0.1, "8.4f")
            text += tensor(f"ffn_moe_topk-{layer}", "i32", rows, "6d", **options)
            if weights:
                text += tensor(f"ffn_moe_weights-{layer}", "f32", np.full(rows.shape, 0.5), "8.4f")
    return text


def test_a_whole_dump_is_read(tmp_path, collect):
    passes = zipf_passes([5, 1], n_experts=16, k=2, layers=LAYERS)
    (tmp_path / "a.txt").write_text(dump(passes))
    reader = collect(LlamaEvalCallback(path=str(tmp_path)))
    trace = reader.load("weights")
    assert reader.card.n_experts == 16 and reader.card.layer_numbers == LAYERS
    np.testing.assert_array_equal(trace.ids_TLK[:5, 1], passes[0][1])
    assert (trace.weights_TLK == 0.5).all() and trace.phase_T.tolist() == [0] * 5 + [1]


def test_without_weights_none_are_made_up(tmp_path, collect):
    (tmp_path / "a.txt").write_text(
        dump(zipf_passes([3], n_experts=16, k=2, layers=LAYERS), weights=False)
    )
    assert "weights" not in collect(LlamaEvalCallback(path=str(tmp_path))).columns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("...", "...") + "", None),
        (lambda text: text[: text.rfind("sum")], "the dump was cut off"),
        (lambda text: text.replace("ffn_moe_topk", "other"), "found none"),
        (lambda text: "", "the file is empty"),
    ],
)
def test_a_dump_that_is_not_whole_is_refused(tmp_path, collect, change, message):
    text = change(dump(zipf_passes([3], n_experts=16, k=2, layers=LAYERS), weights=False))
    (tmp_path / "a.txt").write_text(text)
    if message is None:
        assert collect(LlamaEvalCallback(path=str(tmp_path))).n_tokens == 3
        return
    with pytest.raises(FormatError, match=message):
        collect(LlamaEvalCallback(path=str(tmp_path)))


def test_an_elided_dump_is_refused_with_the_reason(tmp_path, collect):
    (tmp_path / "a.txt").write_text(
        dump(zipf_passes([3], n_experts=16, k=2, layers=LAYERS), elide=True)
    )
    with pytest.raises(
        FormatError, match=r"line \d+: ffn_moe_topk-1 of 2 x 3 was printed with '\.\.\.'"
    ):
        collect(LlamaEvalCallback(path=str(tmp_path)))


def test_an_id_that_cannot_be_is_named_with_its_line(tmp_path, collect):
    passes = zipf_passes([3], n_experts=16, k=2, layers=LAYERS)
    passes[0][0][0, 0] = 70000
    (tmp_path / "a.txt").write_text(dump(passes))
    with pytest.raises(FormatError, match=r"line \d+: expected expert ids"):
        collect(LlamaEvalCallback(path=str(tmp_path)))
