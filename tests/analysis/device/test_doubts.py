"""What is said before the numbers: options that a profile contradicts, MoE that it hides, time that no kernel takes."""

import pandas as pd
import pytest
from profiler_traces import launched, module, operation, written

from analysis.device.advice import advise
from analysis.device.diagnosis import Beside, diagnose, read
from analysis.device.names import load_names
from analysis.device.page import page
from analysis.device.rows import operation_row, to_json
from analysis.device.shapes import Given, Known
from prefetch.errors import ConfigError
from prefetch.models.cards import load_architecture

NAMES = load_names()
CARD = load_architecture("gpt_oss_20b")  # 24 layers, 32 experts, 4 choices, width 2880


def layers(n=24, tokens=8, hidden=3072, experts=32):
    """`n` whole layers, each one operation that is called with tokens and logits."""
    events = []
    for i in range(n):
        dims = [[tokens, hidden], [tokens, experts], []]
        events.append(operation("vllm::moe_forward", 100 * i, 50, dims))
        events += launched(i, "fmoe_kernel", 100 * i + 5, 100 * i + 10, 90)
    return events


def diagnosed(folder, events, known=None):
    return diagnose(read(written(folder, events), NAMES), known or Known(NAMES), Beside())


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"experts": 128}, "experts 32 in the card, 128 in the profile"),
        ({"hidden": 4096}, "hidden 2,880 in the card, 4,096 in the profile"),
        ({"hidden": 2048}, "hidden 2,880 in the card, 2,048 in the profile"),
        ({"n": 36}, "MoE layers 24 in the card, 36 in the profile"),
    ],
)
def test_a_card_of_another_model_is_said_before_the_numbers(tmp_path, profile, says):
    found = diagnosed(tmp_path, layers(**profile), Known(NAMES, Given(), CARD))
    (doubt,) = found.doubts
    assert says in doubt and "experts per token" not in doubt
    assert page(found).index("does not fit") < page(found).index("## Time")
    assert to_json(found)["doubts"] == [doubt]


def test_a_card_that_fits_is_not_doubted_nor_padding_or_several_steps(tmp_path):
    known = Known(NAMES, Given(), CARD)
    assert not diagnosed(tmp_path, layers(48), known).doubts
    assert not diagnosed(tmp_path, layers(24, hidden=2880), known).doubts


def test_without_a_card_those_that_fit_are_named(tmp_path):
    def named(known: Known | None = None, **profile) -> bool:
        notes = diagnosed(tmp_path, layers(**profile), known).notes
        return any("diagnose.model_card=gpt_oss_20b if it is" in note for note in notes)

    assert named() and named(n=48)
    assert not named(n=25) and not named(experts=33) and not named(hidden=2816)
    assert not named(Known(NAMES, Given(), CARD))


def test_the_part_of_a_rank_is_no_other_model(tmp_path):
    dims = [[8, 2880], [8, 5760, 2880], [8, 2880, 2880], [8, 4]]
    events = [operation("vllm::rocm_aiter_fused_moe", 0, 50, dims), module("Moe_0", 0, 60)]
    events += launched(1, "fmoe", 5, 60, 9)
    for ranks, fits in ((4, True), (2, False)):
        found = diagnosed(tmp_path, events, Known(NAMES, Given(expert_parallel=ranks), CARD))
        assert fits is not any("experts 32 in the card, 16" in told for told in found.doubts)


def test_ranks_that_are_not_those_of_the_run_are_said(tmp_path):
    def told(given: Given, ranks: int | None) -> list[str]:
        return list(diagnosed(tmp_path, layers(), Known(NAMES, given, CARD, None, ranks)).doubts)

    assert not told(Given(tensor_parallel=8), 8) and not told(Given(), 8)
    assert not told(Given(tensor_parallel=2, expert_parallel=4), 8)
    assert not told(Given(tensor_parallel=4), None)
    (doubt,) = told(Given(tensor_parallel=4), 8)
    assert "8 ranks" in doubt and "cut over 4" in doubt


def test_without_modules_parts_of_a_layer_are_the_least_that_is_moe(tmp_path):
    product = operation("aten::_grouped_mm", 10, 10, [[8, 64], [4, 64, 32]])
    events = [product, *launched(1, "k", 12, 40, 9), *launched(2, "topk", 30, 55, 9)]
    (doubt,) = diagnosed(tmp_path, events).doubts
    assert "MoE takes at least this" in doubt
    assert not diagnosed(tmp_path, [module("MixtralSparseMoeBlock_0", 0, 60), *events]).doubts
    assert not diagnosed(tmp_path, layers(2)).doubts  # an operation that is the whole layer


@pytest.mark.parametrize(("next_at_us", "is_said"), [(200, True), (120, False)])
def test_a_device_that_mostly_waits_is_said(tmp_path, next_at_us, is_said):
    events = [module("MixtralSparseMoeBlock_0", 0, 60), *launched(1, "topk", 12, 20, 80)]
    events += launched(2, "other", 30, next_at_us, 20)
    text = page(diagnosed(tmp_path, events))
    assert is_said == ("The device did nothing in 50.0% of elapsed time (100.0 µs)" in text)
    assert is_said == ("did nothing" in text)


def test_counted_products_rest_on_no_assumed_type(tmp_path):
    """Their bytes are of the types that they were called with."""
    dims, types = [[8, 32], [32, 4]], ["float", "float"]
    events = [
        module("OlmoeSparseMoeBlock_0", 0, 100), module("OlmoeTopKRouter_0", 5, 20),
        operation("aten::mm", 10, 10, dims, types), *launched(1, "gemm", 12, 200, 9),
    ]  # fmt: skip
    found = diagnosed(tmp_path, events)
    (op,) = found.operations
    assert op.cost.n_bytes == 4 * (8 * 32 + 32 * 4 + 8 * 4)
    assert operation_row(op, 1)["assumptions"] == "" and "bf16 (assumed)" not in page(found)


def test_operations_of_one_name_are_told_apart_by_what_they_were_called_with(tmp_path):
    events = [module("OlmoeSparseMoeBlock_0", 0, 100)]
    for i, dims in enumerate(([[6, 32], [4, 32, 16]], [[6, 16], [4, 16, 32]])):
        events.append(operation("aten::_grouped_mm", 10 + 20 * i, 10, dims))
        events += launched(i, "k", 12 + 20 * i, 200 + 20 * i, 9 - i)
    titles = [one.title for one in diagnosed(tmp_path, events).findings]
    assert len(set(titles)) == 2 and titles[0].endswith("called with [[6, 32], [4, 32, 16]]")


def test_a_product_without_shapes_is_not_sent_to_a_model_card(tmp_path):
    """No card tells the rows of one product."""
    events = [module("OlmoeSparseMoeBlock_0", 0, 100), operation("aten::_grouped_mm", 10, 10)]
    (found,) = diagnosed(tmp_path, [*events, *launched(1, "k", 12, 200, 9)]).findings
    assert "rows" in found.why and "record_shapes=True" in found.why
    assert "model_card" not in found.why


@pytest.mark.parametrize("rule", ["role: up, weight: fp7", "role: up, tile: wide"])
def test_a_type_or_a_tile_that_nobody_knows_is_refused(tmp_path, rule):
    """It would be dropped, and another assumed."""
    path = tmp_path / "names.yaml"
    path.write_text(f"kernels: [{{match: acme, {rule}}}]")
    with pytest.raises(ConfigError, match=r"'acme'.*(fp7|wide)"):
        load_names(path)


@pytest.mark.parametrize("types", ["{fp7: [float]}", "[a]"])
def test_types_that_have_no_size_are_refused(tmp_path, types):
    path = tmp_path / "names.yaml"
    path.write_text(f"types: {types}")
    with pytest.raises(ConfigError, match="types: expected"):
        load_names(path)


def test_remedies_of_ranks_say_that_the_run_cut_its_experts():
    """No rank is busier than another there: placing experts helps only who also spreads them."""
    row = {"setting": "8 ranks", "unit": "load", "before": 1.2, "after": 1.1, "complexity": "low"}
    names = ("place experts", "raise capacity")
    remedies = pd.DataFrame([{**row, "remedy": name, "how": "computed"} for name in names])
    for is_cut in (True, False):
        listed = advise([], [], None, Beside(remedies=remedies), [], is_cut=is_cut)
        told = {one.title: "not as it was run" in one.assumption for one in listed}
        assert told["Place experts by load"] is is_cut
        assert not told["A capacity that drops nearly nothing"]


def test_a_typed_width_is_the_layers_and_not_what_a_second_product_sums_over(tmp_path):
    """The second product of a layer sums over `inner`; only the profile knows which it is."""
    events = [module("OlmoeSparseMoeBlock_0", 0, 100)]
    for i, dims in enumerate(([[6, 32], [4, 32, 16]], [[6, 8], [4, 8, 32]])):
        events.append(operation("aten::_grouped_mm", 10 + 20 * i, 10, dims))
        events += launched(i, "k", 12 + 20 * i, 200 + 20 * i, 9 + i)  # the second is the longer
    given = Given(tokens=3, hidden=32, inner=8, top_k=2, gated=True)
    found = diagnosed(tmp_path, events, Known(NAMES, given))
    assert [op.cost.flops for op in found.operations] == [2 * 6 * 8 * 32, 2 * 6 * 32 * 16]
    assert to_json(found)["efficiency"]["expert_bytes"] == 3 * 32 * 8 * 2
