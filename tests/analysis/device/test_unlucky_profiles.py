"""Attribution where a profile is unlucky: lost kernels, shared numbers, clocks that overlap, two names of one step."""

import pytest
from profiler_traces import launched, module, operation, span, written

from analysis.device.diagnosis import Beside, Diagnosis, diagnose, read
from analysis.device.findings import MOE_UNMODELED, NO_MOE
from analysis.device.names import load_names
from analysis.device.shapes import Known
from prefetch.errors import ConfigError

NAMES = load_names()


def diagnosed(folder, events) -> Diagnosis:
    return diagnose(read(written(folder, events), NAMES), Known(NAMES), Beside())


def test_the_routers_product_is_not_an_experts(tmp_path):
    events = [
        module("OlmoeSparseMoeBlock_0", 0, 100), module("OlmoeTopKRouter_0", 5, 20),
        operation("aten::mm", 10, 10, [[8, 32], [32, 4]]), *launched(1, "gemm", 12, 200, 9),
    ]  # fmt: skip
    (op,) = diagnosed(tmp_path, events).operations
    assert op.role == "router" and op.cost.flops == 2 * 8 * 32 * 4


def test_an_operation_whose_kernels_are_not_known_is_never_no_moe(tmp_path):
    events = [
        operation("vllm::moe_forward", 0, 50, [[8, 64], [8, 4]]),
        *launched(1, "plain", 70, 90, 30),
    ]
    found = diagnosed(tmp_path, events)
    assert found.status == MOE_UNMODELED and list(found.hinted) == ["vllm::moe_forward"]


def test_a_gradient_belongs_to_the_last_that_began_with_its_number(tmp_path):
    """What needs no gradient bears the number that the next one uses."""
    inside = operation("aten::topk", 20, 5, **{"Sequence number": 5, "Fwd thread id": 0})
    behind = operation("aten::add", 70, 5, **{"Sequence number": 5, "Fwd thread id": 0})
    told = {"Sequence number": 5, "Fwd thread id": 1}
    backward = {**operation("autograd::AddBackward0", 500, 20, **told), "tid": 2}
    kernel = launched(2, "add", 505, 520, 6)
    kernel[0]["tid"] = 2
    events = [
        module("MixtralSparseMoeBlock_0", 10, 50), inside, behind, *launched(1, "topk", 22, 40, 3), backward, *kernel,
    ]  # fmt: skip
    assert diagnosed(tmp_path, events).moe_ns == 3_000


def test_two_products_of_the_same_sizes_are_two_calls(tmp_path):
    """Gate and up where they are not one matrix: the cost is of one, the time of both."""
    dims = [[6, 32], [4, 32, 16]]
    events = [module("OlmoeSparseMoeBlock_0", 0, 100)]
    for i in range(2):
        events += [
            operation("aten::_grouped_mm", 10 + 20 * i, 10, dims),
            *launched(i, "k", 12 + 20 * i, 200 + 20 * i, 9),
        ]
    (op,) = diagnosed(tmp_path, events).operations
    assert op.calls == 2 and op.cost.flops == 2 * 6 * 32 * 16 and op.mean_ns == 9_000


def test_a_whole_model_with_one_layer_is_not_that_layer(tmp_path):
    events = [
        module("TinyMoE_0", 0, 1000), module("Attention_0", 5, 50), *launched(1, "attention", 10, 2000, 50),
        module("ToyMoE_0", 100, 50), *launched(2, "a", 112, 2100, 3),
    ]  # fmt: skip
    assert diagnosed(tmp_path, events).moe_ns == 3_000


def test_a_module_that_only_begins_before_a_layer_ends_is_not_inside_it(tmp_path):
    events = [
        module("OlmoeSparseMoeBlock_0", 0, 100), *launched(1, "a", 10, 200, 3),
        module("Linear_0", 99.9, 100), *launched(2, "b", 150, 300, 7),
    ]  # fmt: skip
    assert diagnosed(tmp_path, events).moe_ns == 3_000


def test_products_that_are_counted_run_in_the_type_of_their_inputs(tmp_path):
    half = ["c10::Half", "c10::Half"]
    events = [
        module("OlmoeSparseMoeBlock_0", 0, 100), operation("aten::mm", 10, 10, [[8, 32], [32, 4]], half),
        *launched(1, "gemm", 12, 200, 9),
    ]  # fmt: skip
    (op,) = diagnosed(tmp_path, events).operations
    assert op.cost.arithmetic == "fp16" and op.cost.n_bytes == 2 * (8 * 32 + 32 * 4 + 8 * 4)


def test_steps_are_counted_once_where_two_annotations_name_them(tmp_path):
    events, engine = [], "execute_context_0(0)_generation_8(8)"
    for step in range(2):
        at = 1000 * step
        events += [
            span("user_annotation", name, at + 1, 800) for name in (f"ProfilerStep#{step}", engine)
        ]
        for layer in range(3):
            now = at + 100 * layer
            events += launched(10 * step + layer, "k", now + 5, now + 10, 9)
            events.append(operation("vllm::moe_forward", now, 50, [[8, 64], [8, 4]]))
    found = diagnosed(tmp_path, events)
    assert (found.n_calls, found.n_layers, found.layers_told_by) == (6, 3, "by 2 annotated steps")


def test_a_permutation_of_a_dense_model_is_no_moe(tmp_path):
    names = ["cudnn::batched_transpose_permute_kernel", "tensor_permute_kernel_4d"]
    events = [
        event
        for i, name in enumerate(names)
        for event in launched(i, name, 10 * i, 100 + 10 * i, 5)
    ]
    assert diagnosed(tmp_path, events).status == NO_MOE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kernels: 5", "expected a list of rules"),
        ("steps: 5", "expected a text or a list of texts"),
        ("types: {bf16: 5}", "expected a text or a list of texts"),
        ("operations: [{match: a, role: up, dims: tokens}]", "dims: expected"),
        ("operations: [{match: a, role: up, dims: [[batch, hidden]]}]", "dims: expected"),
        ("operations: [{match: a, role: up, concrete: {top_k: x}}]", "concrete: expected"),
    ],
)  # fmt: skip
def test_a_table_of_the_wrong_form_is_named(tmp_path, text, says):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_names(own)


def test_on_a_cpu_elapsed_and_busy_time_are_those_of_whole_operations(tmp_path):
    """Own time is 60 of the first; yet it lasts 100. Two threads at once are busy once."""
    other = {**operation("aten::add", 80, 40), "tid": 2}
    times = diagnosed(tmp_path, [operation("a", 0, 100), operation("b", 10, 40), other]).times
    assert (times.kernel_ns, times.busy_ns, times.elapsed_ns) == (140_000, 120_000, 120_000)
    assert times.sum_of == "the operations' time"


@pytest.mark.parametrize("names", [("aten::_grouped_mm",) * 2, ("aten::_grouped_mm",) * 3])
def test_parts_of_a_layer_without_modules_are_one_passage(tmp_path, names):
    """Up (once, or gate and up) and down, three layers: not six or nine."""
    events, number = [], 0
    for layer in range(3):
        for part, name in enumerate(names):
            at, width = 1000 * layer + 100 * part, 16 if part < len(names) - 1 else 64
            events.append(operation(name, at, 50, [[6, 32], [4, 32, width]]))
            events += launched(number, "k", at + 5, at + 10, 9)
            number += 1
    found = diagnosed(tmp_path, events)
    assert found.n_calls == 3 and len(found.layer_us) == 3
    assert sum(op.calls for op in found.operations) == 3 * len(names)
