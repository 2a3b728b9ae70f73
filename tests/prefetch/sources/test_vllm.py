"""vLLM's responses of all versions give the same rows; logs of a patched layer, passes without dummy batches."""

import base64
import gzip
import io
import json

import numpy as np
import pytest

from prefetch.errors import ConfigError, FormatError
from prefetch.sources.vllm import Vllm

P, G, L, K, E = 5, 4, 3, 2, 16  # prompt and generated tokens


@pytest.fixture
def ids():
    rng = np.random.default_rng(0)
    return rng.random((P + G - 1, L, E)).argsort(axis=2)[..., :K].astype(np.int16)


def npy64(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def raw64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def usage(**more):
    return {"prompt_tokens": P, "completion_tokens": G, **more}


def forms(ids):
    """Every way in which one request may be written."""
    described = {"data": raw64(ids), "shape": list(ids.shape), "dtype": "int16", "start": 0}
    split = {"prompt_routed_experts": ids[:P].tolist()}
    return {
        "lists, split": {"choices": [{"routed_experts": ids[P:].tolist()}], **split},
        "npy": {"choices": [{"routed_experts": npy64(ids)}], "usage": usage()},
        "raw": {"choices": [{"routed_experts": raw64(ids)}], "usage": usage()},
        "described": {"choices": [{"routed_experts": described}], "usage": usage()},
        "RequestOutput": {
            "outputs": [{"routed_experts": ids.tolist(), "token_ids": [10] * G}],
            "prompt_token_ids": [9] * P,
        },
        "flat": {"routed_experts": ids[P:].tolist(), **split},
    }


def write(path, *responses):
    text = "".join(json.dumps(response) + "\n" for response in responses)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


FORMS = sorted(forms(np.zeros((P + G - 1, L, K), np.int16)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_response(collect, tmp_path, ids, form):
    path = write(tmp_path / "chat.jsonl", forms(ids)[form])
    source = Vllm(path=path, n_experts=E, n_layers=L, top_k=K, dtype="int16")
    trace = collect(source).load()
    np.testing.assert_array_equal(trace.ids_TLK, ids)
    assert trace.phase_T.tolist() == [0] * P + [1] * (G - 1)
    assert trace.position_T.tolist() == list(range(P + G - 1))
    assert trace.executed_T.all() and trace.domains == ("chat",)


def test_requests_gzip_and_tokens(collect, tmp_path, ids):
    response = forms(ids)["RequestOutput"]
    response["prompt_token_ids"] = list(range(P))
    reader = collect(Vllm(path=write(tmp_path / "a.jsonl.gz", response, response), n_experts=E))
    assert reader.n_requests == 2
    assert reader.load().token_T.tolist() == [*range(P), *[10] * (G - 1)] * 2


def test_rows_of_the_prefix_cache_are_not_executed(collect, tmp_path, ids):
    choice = {"routed_experts": npy64(ids)}
    cached = usage(prompt_tokens_details={"cached_tokens": 3})
    path = write(tmp_path / "a.jsonl", {"choices": [choice], "usage": cached})
    wanted = [False] * 3 + [True] * (P + G - 4)
    assert collect(Vllm(path=path, n_experts=E)).load().executed_T.tolist() == wanted
    path = write(tmp_path / "b.jsonl", {"choices": [choice], "usage": usage()})
    source = Vllm(path=path, n_experts=E, cached_tokens=3)
    assert collect(source).load().executed_T.tolist() == wanted


def test_generated_rows_alone_and_a_prompt_whose_beginning_was_left_out(collect, tmp_path, ids):
    only = {"choices": [{"routed_experts": npy64(ids[P:])}], "usage": usage()}
    trace = collect(Vllm(path=write(tmp_path / "a.jsonl", only), n_experts=E)).load()
    assert trace.position_T.tolist() == list(range(P, P + G - 1)) and trace.phase_T.all()
    cut = {"choices": [{"routed_experts": npy64(ids[2:])}], "usage": usage()}
    cut["routed_experts_prompt_start"] = 2
    trace = collect(Vllm(path=write(tmp_path / "b.jsonl", cut), n_experts=E)).load()
    assert trace.position_T.tolist() == list(range(2, P + G - 1))


def test_choices_share_a_prompt_that_ran_once(collect, tmp_path, ids):
    choices = [{"routed_experts": npy64(ids), "token_ids": [1] * G} for _ in range(2)]
    path = write(
        tmp_path / "a.jsonl", {"choices": choices, "usage": usage(completion_tokens=2 * G)}
    )
    trace = collect(Vllm(path=path, n_experts=E)).load()
    assert trace.request_T.max() == 1
    assert trace.executed_T.tolist() == [True] * (P + G - 1) + [False] * P + [True] * (G - 1)


def test_a_npy_needs_the_length_of_its_prompt(collect, tmp_path, ids):
    np.save(tmp_path / "a.npy", ids)
    path = str(tmp_path / "a.npy")
    with pytest.raises(FormatError, match=r"a\.npy.*source.prompt_tokens"):
        collect(Vllm(path=path, n_experts=E))
    trace = collect(Vllm(path=path, n_experts=E, prompt_tokens=P)).load()
    assert trace.phase_T.tolist() == [0] * P + [1] * (G - 1)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({"choices": [{"text": "a"}], "usage": usage()}, "enable-return-routed-experts"),
        ({"choices": [{"routed_experts": "AAAA"}], "usage": usage()}, "source.n_layers"),
        ({"choices": [{"routed_experts": "%%"}], "usage": usage()}, "a response"),
        ({"choices": [{"routed_experts": [[[1, 2]], [[1]]]}], "usage": usage()}, "a response"),
        ({"choices": [{"routed_experts": [[[1, 2]]] * 3}]}, "source.prompt_tokens"),
        ({"choices": [{"routed_experts": [[[1, 2]]] * 6}], "usage": usage()}, "expected 8 rows"),
        (
            {"choices": [{"routed_experts": [[[1, 99]]] * 8}], "usage": usage()},
            "99 is out of range",
        ),
        ({"choices": [{"routed_experts": [[[0.5, 2]]] * 8}], "usage": usage()}, "whole numbers"),
    ],
)
def test_broken_responses_name_their_line(collect, tmp_path, ids, response, message):
    path = write(tmp_path / "a.jsonl", forms(ids)["npy"], response)
    with pytest.raises(FormatError, match=rf"a\.jsonl, line 2.*{message}"):
        collect(Vllm(path=path, n_experts=E))


def log(ids_TLK, first=0):
    return [
        {
            "layer": 2 * layer + 1,
            "token_idx": t,
            "topk_ids": row.tolist(),
            "topk_weights": [0.5, 0.25],
        }
        for layer in range(ids_TLK.shape[1])
        for t, row in enumerate(ids_TLK[:, layer], first)
    ]


def test_a_log_of_passes_without_dummy_batches(collect, tmp_path, ids):
    dummy = np.repeat(ids[:1], 9, axis=0)
    lines = [
        {"type": "meta", "top_k": K},
        *log(dummy),
        *log(ids[:5]),
        *log(dummy[:2]),
        *log(ids[5:]),
    ]
    reader = collect(Vllm(path=write(tmp_path / "moe.jsonl", *lines), n_experts=E), max_dropped=0.6)
    trace = reader.load("weights")
    np.testing.assert_array_equal(trace.ids_TLK, ids)
    assert reader.card.layer_numbers == (1, 3, 5)
    assert trace.request_T.tolist() == [0] * 5 + [1] * 3
    assert trace.weights_TLK[0, 0].tolist() == [0.5, 0.25]
    assert reader.provenance.dropped_rows == {"dummy batches: passes of one constant row": 11}
    assert any("batch rows" in note for note in reader.provenance.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"\{1: 8, 3: 8, 5: 7\}"),
        (lambda rows: [*rows[:-1], {**rows[-1], "token_idx": 99}], "not the same token"),
        (lambda rows: [*rows[:-1], {**rows[-1], "topk_ids": [1]}], "lists of one length"),
        (
            lambda rows: [*rows[:-1], {**rows[-1], "layer": None}],
            "layer, token_idx, topk_ids in every row",
        ),
    ],
)
def test_logs_whose_layers_do_not_align(collect, tmp_path, ids, change, message):
    path = write(tmp_path / "moe.jsonl", *change(log(ids)))
    with pytest.raises(FormatError, match=rf"moe\.jsonl.*{message}"):
        collect(Vllm(path=path, n_experts=E))


def test_an_unknown_dtype():
    with pytest.raises(ConfigError, match="dtype"):
        Vllm(path="x", dtype="float32")


def test_choices_of_one_response_share_its_usage_without_moving_their_rows(tmp_path, collect, ids):
    choices = [{"routed_experts": npy64(ids)}, {"routed_experts": npy64(ids[:, :, ::-1])}]
    response = {"choices": choices, "usage": usage(completion_tokens=2 * G)}
    trace = collect(Vllm(path=write(tmp_path / "a.jsonl", response), n_experts=E)).load()
    assert trace.position_T.tolist() == [*range(P + G - 1)] * 2
    assert trace.phase_T.tolist() == ([0] * P + [1] * (G - 1)) * 2


def test_a_null_in_the_place_of_cached_tokens_leaves_the_setting(tmp_path, collect, ids):
    response = {**forms(ids)["npy"], "num_cached_tokens": None}
    path = write(tmp_path / "a.jsonl", response)
    trace = collect(Vllm(path=path, n_experts=E, cached_tokens=3)).load()
    assert trace.executed_T.tolist() == [False] * 3 + [True] * (P + G - 4)


def test_lines_that_inflate_without_measure_are_refused(tmp_path, collect):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 100_000_000))
    with pytest.raises(FormatError, match="inflates to more than"):
        collect(Vllm(path=str(tmp_path / "a.jsonl.gz"), n_experts=E))
