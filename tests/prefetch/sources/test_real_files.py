"""Every real recording beside the project is collected with the shapes and facts that its README states."""

import numpy as np
import pytest

from prefetch.sources.arrays import Arrays
from prefetch.sources.counts import Counts
from prefetch.sources.esft import Esft
from prefetch.sources.route_csv import RouteCsv
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import DECODE, no_expert

ESFT = "traces/esft-deepseek-v2-lite"
GPT_OSS = "traces/gpt-oss-20b/gptoss20b_"
EDGE = "traces/big-moe-on-edge"


def same_as_previous_token(trace):
    """Share of choices that the token before, in the same request and layer, also made."""
    is_next = trace.request_T[1:] == trace.request_T[:-1]
    here, before = trace.ids_TLK[1:][is_next], trace.ids_TLK[:-1][is_next]
    return (here[..., :, None] == before[..., None, :]).any(-1).mean()


def entropies(trace):
    """Bits, per layer."""
    counts_LE = [
        np.bincount(layer.ravel(), minlength=trace.card.n_experts)
        for layer in trace.ids_TLK.transpose(1, 0, 2)
    ]
    shares = [counts[counts > 0] / counts.sum() for counts in counts_LE]
    return [-(share * np.log2(share)).sum() for share in shares]


@pytest.mark.parametrize(
    ("name", "tokens", "requests", "mean", "least", "most", "repeats"),
    [
        ("intent", 8222, 127, 5.60, 5.46, 5.73, 0.262),
        ("law", 8327, 33, 5.76, 5.55, 5.94, 0.290),
        ("summary", 8479, 13, 5.67, 5.42, 5.90, 0.291),
    ],
)
def test_esft_arrays(collect, real_data, name, tokens, requests, mean, least, most, repeats):
    path = real_data / ESFT / f"esft_deepseek_v2_lite_{name}.npz"
    reader = collect(Arrays(path=str(path)))
    assert (reader.n_tokens, reader.n_requests) == (tokens, requests)
    assert reader.card.layer_numbers == tuple(range(1, 27))
    assert (reader.card.n_experts, reader.card.top_k) == (64, 6)
    trace = reader.load("weights")
    bits = entropies(trace)
    found = (np.mean(bits), min(bits), max(bits), same_as_previous_token(trace))
    np.testing.assert_allclose(found, (mean, least, most, repeats), atol=0.0051)  # as printed there
    assert trace.weights_TLK.astype(np.float32).sum(axis=2).max() <= 1.002  # not renormalised


@pytest.mark.parametrize(
    ("name", "tokens", "requests", "least", "most", "repeats"),
    [
        ("Polyglot-or-Not_Fact-Completion", 1188, 4, 3.58, 4.68, 0.420),
        ("tulu3_persona_if", 1470, 4, 3.82, 4.74, 0.446),
        ("gpqa_main", 12186, 29, 4.05, 4.77, 0.458),
        ("mmlu_dev", 24629, 97, 4.35, 4.86, 0.432),
        ("mmlu_pro_validation", 7061, 26, 4.35, 4.84, 0.432),
    ],
)
def test_gpt_oss_arrays(collect, real_data, name, tokens, requests, least, most, repeats):
    path = real_data / f"{GPT_OSS}{name}.npz"
    reader = collect(Arrays(path=str(path), default_phase="decode", n_experts=32))
    assert (reader.n_tokens, reader.n_requests) == (tokens, requests)
    assert (reader.card.n_layers, reader.card.n_experts, reader.card.top_k) == (24, 32, 4)
    trace = reader.load("weights")
    assert (trace.phase_T == DECODE).all() and trace.position_T[trace.starts_R].min() > 0
    bits = entropies(trace)
    found = (min(bits), max(bits), same_as_previous_token(trace))
    np.testing.assert_allclose(found, (least, most, repeats), atol=0.0051)
    sums = trace.weights_TLK.astype(np.float32).sum(axis=2)
    np.testing.assert_allclose(sums, 1, atol=4e-3)  # they were rounded to bfloat16 by the model


def test_all_files_of_a_folder_keep_their_requests_and_domains_apart(collect, real_data):
    reader = collect(Arrays(path=str(real_data / ESFT)))
    assert (reader.n_tokens, reader.n_requests) == (25028, 173)
    assert reader.domains == tuple(
        f"esft_deepseek_v2_lite_{name}" for name in ("intent", "law", "summary")
    )


def test_esft_text_equals_the_arrays(collect, real_data):
    text = collect(Esft(path=str(real_data / ESFT / "raw_intent"))).load("weights")
    path = real_data / ESFT / "esft_deepseek_v2_lite_intent.npz"
    arrays = collect(Arrays(path=str(path))).load("weights")
    assert text.card.layer_numbers == (1, 2, 3)
    np.testing.assert_array_equal(text.ids_TLK, arrays.ids_TLK[:, :3])
    np.testing.assert_array_equal(text.weights_TLK, arrays.weights_TLK[:, :3])
    np.testing.assert_array_equal(text.request_T, arrays.request_T)
    np.testing.assert_array_equal(text.position_T, arrays.position_T)


@pytest.mark.parametrize(
    ("name", "prompt", "decode", "layers", "k", "prefill_lookups", "hits", "lookups", "rate"),
    [
        ("qwen", 28, 128, 48, 6, 2662, 29597, 36864, 0.7488),
        ("gptoss", 85, 64, 36, 2, 1767, 2066, 4608, 0.3241),
    ],
)
def test_route_csv(
    collect, real_data, name, prompt, decode, layers, k, prefill_lookups, hits, lookups, rate
):
    reader = collect(RouteCsv(path=str(real_data / EDGE / f"{name}.route.csv")))
    trace, facts = reader.load("weights"), reader.provenance.facts
    assert (reader.card.n_layers, reader.card.n_experts, reader.card.top_k) == (layers, 128, k)
    assert np.bincount(trace.phase_T).tolist() == [prompt, decode]
    assert trace.position_T.tolist() == list(range(prompt + decode))
    last_layer_T = (trace.ids_TLK[:, -1] != no_expert(128)).all(axis=1)
    assert last_layer_T.sum() == decode + 1  # of the prompt, only its final token
    assert (trace.ids_TLK[:, :-1] != no_expert(128)).all()
    assert (facts["recorded_prefill_lookups"], facts["recorded_prefill_hits"]) == (
        prefill_lookups,
        0,
    )
    assert (facts["recorded_decode_hits"], facts["recorded_decode_lookups"]) == (hits, lookups)
    assert facts["recorded_hit_rate"] == pytest.approx(rate, abs=5e-5)
    sums = trace.weights_TLK[last_layer_T].astype(np.float32).sum(axis=2)
    np.testing.assert_allclose(sums, 1, atol=2e-3)


def test_route_csv_keeps_the_bytes_of_every_layer(collect, real_data):
    reader = collect(RouteCsv(path=str(real_data / EDGE / "qwen.route.csv")))
    sizes = reader.card.expert_bytes_L
    assert sorted(sizes) == [2_654_208] * 24 + [3_059_712] * 24
    assert reader.card.all_expert_bytes // 2**20 == 16_740  # MiB
    assert reader.card.dense_bytes // 2**20 == 540  # 541 MiB rounded
    gptoss = collect(RouteCsv(path=str(real_data / EDGE / "gptoss.route.csv")))
    assert gptoss.card.all_expert_bytes // 2**20 == 58_092


def test_switch_counts(real_data):
    path = real_data / "counts" / "switch-base-128.expert_statistics_3d.json"
    counts = Counts(path=str(path)).count(Provenance("real", "counts"))
    assert counts.card.layer_numbers == (1, 3, 5, 7, 9, 11)
    assert (counts.card.n_experts, counts.card.top_k) == (128, 1)
    assert counts.counts_LE.sum(axis=1).tolist() == [206_866] * 6
    assert counts.counts_LE.argmax(axis=1).tolist() == [47, 122, 22, 34, 87, 114]
    assert (counts.counts_LE > 0).sum(axis=1).tolist() == [127, 126, 124, 124, 124, 121]


def test_gemma_counts(real_data):
    path = str(real_data / "counts" / "gemma-4-26b.routing-locality.json")
    counts = Counts(path=path).count(Provenance("real", "counts"))
    assert (counts.card.n_layers, counts.card.n_experts, counts.card.top_k) == (30, 128, 8)
    assert (counts.counts_LE.sum(axis=1) == 21_858 * 8).all()
    one = Counts(path=path, family="performance_512", n_experts=128)
    assert (one.count(Provenance("real", "counts")).counts_LE.sum(axis=1) == 539 * 8).all()
