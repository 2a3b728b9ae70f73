"""The server's log: passes, tokens and requests are put together rightly, and strided prompts are found."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from router_logs import LAYERS, zipf_passes

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.llama_server import LlamaServer

HEADER = "layer_id,expert_ids\n"


def log_lines(passes: list[list[np.ndarray]], layers=LAYERS) -> str:
    """passes[p][l] is [T, K]: written as the logger does, layer after layer."""
    lines = [
        f"{layer},{' '.join(map(str, row))}\n"
        for one in passes
        for layer, rows in zip(layers, one, strict=True)
        for row in rows.tolist()
    ]
    return HEADER + "".join(lines)


def write(folder: Path, text: str, name: str = "run.log") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_stride_defect_is_refused_with_the_reason_and_the_correct_log_is_accepted(
    tmp_path, collect
):
    bad = write(tmp_path, log_lines(zipf_passes([512], stride=True)), "bad.log")
    with pytest.raises(
        FormatError, match=r"bad\.log, lines 2 to 2049: 25 of 25 blocks of 160 choices.*stride"
    ):
        collect(LlamaServer(path=bad, n_experts=160))
    good = write(tmp_path, log_lines(zipf_passes([512])), "good.log")
    assert collect(LlamaServer(path=good, n_experts=160)).n_tokens == 512


def test_dropping_keeps_the_passes_of_one_token_and_counts_the_rest(tmp_path, collect):
    passes = zipf_passes([100, *[1] * 120], stride=True)
    path = write(tmp_path, log_lines(passes))
    with pytest.raises(FormatError, match=r"corrupted=drop to keep the passes of one token"):
        collect(LlamaServer(path=path, n_experts=160))
    reader = collect(LlamaServer(path=path, n_experts=160, corrupted="drop"))
    assert reader.provenance.dropped_rows == {"rows of passes logged with a wrong stride": 100}
    trace = reader.load()
    assert trace.phase_T.tolist() == [1] * 120 and trace.position_T[0] == 100
    np.testing.assert_array_equal(trace.ids_TLK[0], np.stack([rows[0] for rows in passes[1]]))


def test_short_strided_prompts_are_found_over_all_layers_and_passes(tmp_path, collect):
    layers = tuple(range(40))
    path = write(tmp_path, log_lines(zipf_passes([3] * 5, stride=True, layers=layers), layers))
    with pytest.raises(FormatError, match="ignores the stride"):
        collect(LlamaServer(path=path, n_experts=160))
    path = write(tmp_path, log_lines(zipf_passes([3] * 5, layers=layers), layers))
    assert collect(LlamaServer(path=path, n_experts=160)).n_tokens == 15


def test_tokens_layers_and_requests_stand_where_the_log_has_them(tmp_path, collect):
    passes = zipf_passes([20, 1, 1, 30, 1], last=1)
    reader = collect(LlamaServer(path=write(tmp_path, log_lines(passes)), n_experts=160))
    assert reader.card.layer_numbers == LAYERS and reader.domains == ("run",)
    trace = reader.load()
    assert trace.request_T.tolist() == [0] * 22 + [1] * 31
    assert trace.position_T.tolist() == [*range(22), *range(31)]
    assert trace.phase_T.tolist() == [0] * 20 + [1, 1] + [0] * 30 + [1]
    np.testing.assert_array_equal(trace.ids_TLK[:20, 0], passes[0][0])
    np.testing.assert_array_equal(trace.ids_TLK[20], np.stack([rows[0] for rows in passes[1]]))
    last = trace.ids_TLK[:20, 3]
    assert (last[:19] == 255).all(), "tokens without an output have no row in the last layer"
    np.testing.assert_array_equal(last[19:], passes[0][3])


def test_a_full_micro_batch_goes_on_in_the_next_pass(tmp_path, collect):
    passes = zipf_passes([64, 64, 10, 1, 20])
    passes[0] = [
        *passes[0][:3],
        passes[0][3][:0],
    ]  # a micro-batch without an output has no last layer
    path = write(tmp_path, log_lines(passes))
    trace = collect(LlamaServer(path=path, n_experts=160, ubatch=64)).load()
    assert np.bincount(trace.request_T).tolist() == [139, 20]
    assert (trace.ids_TLK[:64, 3] == 255).all() and (trace.ids_TLK[64:, 3] != 255).all()
    assert collect(LlamaServer(path=path, n_experts=160, one_request=True)).n_requests == 1


def test_top_1_rows_a_byte_order_mark_and_windows_line_ends(tmp_path, collect):
    passes = zipf_passes([40, 1], n_experts=8, k=1)
    text = "\ufeff" + log_lines(passes).replace("\n", "\r\n")
    trace = collect(LlamaServer(path=write(tmp_path, text), n_experts=8)).load()
    assert trace.ids_TLK.shape == (41, 4, 1)
    np.testing.assert_array_equal(trace.ids_TLK[:40, 2], passes[0][2])


def with_gates(passes, width: int = 5, layers=LAYERS) -> tuple[str, np.ndarray]:
    """The same log with a gate_input line before every row, and what they hold [T, L, D]."""
    rng, lines, gates = np.random.default_rng(0), [HEADER], []
    for one in passes:
        values = rng.normal(size=(len(one[0]), len(layers), width)).astype(np.float16)
        gates.append(values)
        for slot, (layer, rows) in enumerate(zip(layers, one, strict=True)):
            lines += [
                f"gate_input,{layer},{t},{' '.join(f'{x:.6g}' for x in values[t, slot])}\n"
                for t in range(len(values))
            ]
            lines += [f"{layer},{' '.join(map(str, row))}\n" for row in rows.tolist()]
    return "".join(lines), np.concatenate(gates)


def test_gate_inputs_in_the_same_file_are_skipped_or_kept(tmp_path, collect):
    passes = zipf_passes([20, 1, 1], last=1)
    text, gates = with_gates(passes)
    path = write(tmp_path, text)
    plain = collect(LlamaServer(path=path, n_experts=160))
    assert any("gate_input lines were skipped" in note for note in plain.provenance.notes)
    kept = collect(LlamaServer(path=path, n_experts=160, gate_inputs=True)).load("gate_inputs")
    np.testing.assert_array_equal(kept.ids_TLK, plain.load().ids_TLK)
    np.testing.assert_allclose(kept.gate_inputs_TLD, gates, rtol=1e-3)  # six digits, then float16
    lines = text.splitlines(keepends=True)
    del lines[1]
    with pytest.raises(FormatError, match="1 have none"):
        collect(LlamaServer(path=write(tmp_path, "".join(lines)), n_experts=160, gate_inputs=True))


def test_the_variant_with_token_index_and_weights(tmp_path, collect):
    passes = zipf_passes([30, 1], k=2, n_experts=40)
    lines = ["=== MoE Expert Selection Log ===\n", "Layer,Token,ExpertIDs,ExpertWeights\n"]
    for one in passes:
        for layer, rows in zip(LAYERS, one, strict=True):
            lines += [
                f'{layer},{t},"[{a} {b}]","[0.75 0.25]"\n' for t, (a, b) in enumerate(rows.tolist())
            ]
    trace = collect(LlamaServer(path=write(tmp_path, "".join(lines)), n_experts=40)).load("weights")
    np.testing.assert_array_equal(trace.ids_TLK[:30, 1], passes[0][1])
    assert (trace.weights_TLK == np.array([0.75, 0.25])).all()


def test_a_log_that_was_cut_off_loses_its_last_pass_only(tmp_path, collect):
    text = log_lines(zipf_passes([20, 1, 1]))
    reader = collect(LlamaServer(path=write(tmp_path, text[:-3]), n_experts=160))
    assert reader.n_tokens == 21
    assert reader.provenance.dropped_rows == {"rows of the last pass, which was cut off": 1}
    middle = "".join(text.splitlines(keepends=True)[:-2])
    assert collect(LlamaServer(path=write(tmp_path, middle), n_experts=160)).n_tokens == 21


def test_gzip_is_read_as_it_is(tmp_path, collect):
    (tmp_path / "a.log.gz").write_bytes(gzip.compress(log_lines(zipf_passes([20, 1])).encode()))
    assert collect(LlamaServer(path=str(tmp_path), n_experts=160)).n_tokens == 21


def test_requests_and_domains_of_two_logs_do_not_mix(tmp_path, collect):
    write(tmp_path, log_lines(zipf_passes([20, 1])), "law.log")
    write(tmp_path, log_lines(zipf_passes([9, 1])), "code.log")
    reader = collect(LlamaServer(path=str(tmp_path), n_experts=160))
    trace = reader.load()
    assert reader.domains == ("code", "law") and np.bincount(trace.request_T).tolist() == [10, 21]


def test_experts_are_inferred_only_when_none_is_missing(tmp_path, collect):
    path = write(tmp_path, log_lines(zipf_passes([400], n_experts=12, k=2)))
    reader = collect(LlamaServer(path=path))
    assert reader.card.n_experts == 12 and "largest id + 1" in reader.provenance.notes[0]
    path = write(tmp_path, log_lines(zipf_passes([3], n_experts=160)))
    with pytest.raises(FormatError, match=r"pass source\.n_experts"):
        collect(LlamaServer(path=path))


GOOD = log_lines(zipf_passes([20, 1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (HEADER.encode(), "expected rows `layer,ids`, found none"),
        (
            GOOD.replace("\n4,", "\n4,999 ", 1).encode(),
            "expected 8 ids as in the first row, found 9",
        ),
        (
            GOOD.replace("\n4,", "\n4,x", 1).encode(),
            r"line 22: expected only numbers from here on, got 'x",
        ),
        (GOOD.replace("\n4,", "\n\n# note\n4,", 1).encode(), "line 23: expected the header"),
        (GOOD.encode("utf-16"), "expected text in UTF-8, found UTF-16"),
        (GOOD.encode() + b"\0", "found a NUL byte"),
        (b"\x1f\x8bjunk", "expected a gzip file"),
        (gzip.compress(b"3,1 2\n" * 10_000_000), "inflates to more than"),
        (GOOD.replace("\n5,", "\n7,", 3).encode(), "must have equal rows in each of the layers"),
        (GOOD.replace("\n3,", "\n3,-", 1).encode(), "line 2: expected expert ids as whole numbers"),
        (GOOD.replace("\n3,", "\n3,0.5", 1).encode(), "line 2"),
    ],
)
def test_a_malformed_log_is_named_with_its_line(tmp_path, collect, content, message):
    (tmp_path / "bad.log").write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        collect(LlamaServer(path=str(tmp_path / "bad.log"), n_experts=1000))
    assert "bad.log" in str(caught.value)


def test_rows_with_an_id_more_than_weights_are_named_with_their_line(tmp_path, collect):
    text = "Layer,Token,ExpertIDs,ExpertWeights\n3,0,1 2 0.5\n4,0,2 1 0.5\n"
    with pytest.raises(FormatError, match=r"run\.log, line 2: expected as many weights as ids"):
        collect(LlamaServer(path=write(tmp_path, text), n_experts=8))


def test_an_id_twice_and_out_of_range(tmp_path, collect):
    lines = GOOD.splitlines(keepends=True)
    lines[5] = "3,1 1 2 3 4 5 6 7\n"
    with pytest.raises(FormatError, match="expected 8 distinct experts"):
        collect(LlamaServer(path=write(tmp_path, "".join(lines)), n_experts=160))
    with pytest.raises(
        FormatError, match=r"line \d+: expert id \d+ is out of range for 100 experts"
    ):
        collect(LlamaServer(path=write(tmp_path, GOOD), n_experts=100))


@pytest.mark.parametrize("path", [None, "nowhere.log", "*.nothing"])
def test_a_path_that_is_not_there(path, collect):
    with pytest.raises(ConfigError, match=r"source\.path"):
        collect(LlamaServer(path=path))


def test_gate_inputs_of_a_pass_that_was_cut_off_touch_no_other(tmp_path, collect):
    text, gates = with_gates(zipf_passes([20, 1, 1]))
    cut = write(tmp_path, text[:-3])
    trace = collect(LlamaServer(path=cut, n_experts=160, gate_inputs=True)).load("gate_inputs")
    np.testing.assert_allclose(trace.gate_inputs_TLD, gates[:21], rtol=1e-3)


def test_two_gate_inputs_for_one_token_are_refused(tmp_path, collect):
    lines = with_gates(zipf_passes([20, 1]))[0].splitlines(keepends=True)
    lines.insert(1, lines[1])
    path = write(tmp_path, "".join(lines))
    with pytest.raises(FormatError, match="two gate_input lines"):
        collect(LlamaServer(path=path, n_experts=160, gate_inputs=True))
