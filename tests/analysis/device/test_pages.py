"""What a person reads: true also where little is known, and not broken by what somebody calls a kernel."""

import json

import pandas as pd
import pytest
from profiler_traces import launched, module, operation, written

from analysis.device import seed_files
from analysis.device.diagnosis import Beside, diagnose, read
from analysis.device.names import load_names
from analysis.device.page import first_line, page
from analysis.device.plain_text import shown
from analysis.device.roofline import Peaks
from analysis.device.rows import metrics, to_json
from analysis.device.shapes import Given, Known

NAMES = load_names()
EVIL = "a | moe <img src=x> `code` [x](http://e) **b**\n# H1 \x1b[31m $x^2$ 模型"
PEAKS = Peaks("a device", 1e12, {"bf16": 1e14})
DIMS = [[8, 64], [16, 64, 64], [16, 64, 32], [8, 3]]


def diagnosed(folder, events, known=None, peaks=PEAKS):
    return diagnose(read(written(folder, events), NAMES), known or Known(NAMES), Beside(peaks))


def test_a_name_cannot_break_a_page(tmp_path):
    found = diagnosed(tmp_path, [operation(EVIL, 0, 50), *launched(1, EVIL, 5, 60, 30)])
    for text in (page(found), seed_files.page_of(found)):
        rows = [
            line for line in text.splitlines() if "moe &lt;img" in line and line.startswith("|")
        ]
        heads = [line for line in text.splitlines() if line.startswith("| ")]
        assert rows and "\x1b" not in text and "<img" not in text and "\n# H1" not in text
        bare = [row.replace("\\|", "").count("|") for row in rows]
        assert set(bare) <= {head.replace("\\|", "").count("|") for head in heads}
        assert "模型" in text and "\\[x](" in text


@pytest.mark.parametrize("text", ["a_b::c<d>", "__x__", "x|y", "`x`", "plain name 17"])
def test_what_is_shown_keeps_every_letter(text):
    plain = shown(text).replace("\\", "").replace("&lt;", "<")
    assert plain == text


def test_what_could_not_be_judged_is_not_said_to_be_no_bottleneck(tmp_path):
    events = [module("experts_0", 0, 50), *launched(1, "secret", 5, 60, 30)]
    text = page(diagnosed(tmp_path, events))
    assert "Not known: no operation could be judged." in text and "None: nothing" not in text
    both = [
        *events,
        operation("vllm::rocm_aiter_fused_moe", 100, 50, DIMS),
        *launched(2, "k", 105, 200, 1),
    ]
    told = page(diagnosed(tmp_path, both, peaks=Peaks("slow", 3e11, {"bf16": 1e14})))
    assert "None in the" in told or "## Anomalies" in told


def test_small_numbers_are_not_printed_as_nought(tmp_path):
    events = [
        operation("vllm::rocm_aiter_fused_moe", 0, 50, DIMS), *launched(1, "aiter_fused_moe", 5, 60, 9000),
        *launched(2, "moe_sorting", 10, 9100, 900.0),
    ]  # fmt: skip
    text = page(diagnosed(tmp_path, events))
    assert "needs 0.0 µs" not in text and "| 0.000 |" not in text and " 0.0% of the" not in text


def test_counts_are_singular_or_plural_and_say_what_tells_the_layers(tmp_path):
    events = [operation("vllm::rocm_aiter_fused_moe", 0, 50, DIMS), *launched(1, "k", 5, 60, 9)]
    text = page(diagnosed(tmp_path, events))
    assert "in 1 passage through a MoE layer (1 layer if the profile is of one step)" in text


def test_without_a_finding_nothing_claims_one(tmp_path):
    events = [module("AcmeMoeStack_0", 0, 50), *launched(1, "plain", 5, 60, 30)]
    found = diagnosed(tmp_path, events)
    assert (
        first_line(found)
        == "MOE_UNMODELED: names look like MoE, and no work in them was recognised as it"
    )
    assert "AcmeMoeStack: 30.0 µs of work inside" in page(found)
    assert to_json(found)["looks_like_moe"] == {"AcmeMoeStack": 30.0}


def test_impacts_that_cannot_be_computed_stand_apart_with_what_they_need(tmp_path):
    events = [operation("vllm::rocm_aiter_fused_moe", 0, 50, DIMS), *launched(1, "k", 5, 60, 9)]
    text = page(diagnosed(tmp_path, events))
    last = text.split("their impact not computable from this input:")[1]
    assert (
        "It needs the routing (pass trace=FOLDER): " in last and last.count("not computable") == 0
    )
    assert "the tile, which no kernel's name tells" in last


def test_numbers_of_a_page_are_finite_json(tmp_path):
    events = [operation("vllm::rocm_aiter_fused_moe", 0, 50, DIMS), *launched(1, "k", 5, 60, 0)]
    found = diagnosed(tmp_path, events, Known(NAMES, Given(top_k=2)))
    json.dumps([to_json(found), metrics(found), seed_files.metrics_of(found)], allow_nan=False)
    assert isinstance(found.kernels, pd.DataFrame)
