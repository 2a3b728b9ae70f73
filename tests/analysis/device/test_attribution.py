"""Who launched what: operations, modules, captured graphs, gradients; and when "no MoE" may be said."""

import numpy as np
import pytest
from profiler_traces import launched, module, operation, span, written

from analysis.device.diagnosis import Beside, Diagnosis, diagnose, read
from analysis.device.findings import MOE_UNMODELED, NO_MOE, OK
from analysis.device.names import load_names
from analysis.device.shapes import Known
from prefetch.errors import ConfigError

NAMES = load_names()


def diagnosed(folder, events, names=NAMES, **meta) -> Diagnosis:
    return diagnose(read(written(folder, events, **meta), names), Known(names), Beside())


def test_a_dense_model_is_no_moe(tmp_path):
    events = [
        module("LlamaDecoderLayer_0", 0, 100), module("LlamaMLP_0", 10, 50), operation("aten::mm", 20, 10),
        *launched(1, "sm90_xmma_gemm_bf16bf16_bf16f32", 22, 50, 30), *launched(2, "flash_fwd_kernel", 70, 90, 5),
    ]  # fmt: skip
    found = diagnosed(tmp_path, events)
    assert found.status == NO_MOE and not found.operations and not found.recommendations
    assert found.times.moe_kernel_ns == 0 and found.times.kernel_ns == 35_000


def test_an_unknown_kernel_in_a_module_called_experts_is_unmodelled_with_its_time(tmp_path):
    events = [
        module("experts_0", 10, 50), *launched(1, "secret_kernel_x17", 20, 50, 30), *launched(2, "other", 70, 90, 10),
    ]  # fmt: skip
    found = diagnosed(tmp_path, events)
    assert found.status == MOE_UNMODELED and found.moe_ns == 30_000
    assert [(f.kind, f.time_ns) for f in found.findings] == [("unmodelled", 30_000)]
    assert found.times.of_kernel_time == 0.75


@pytest.mark.parametrize("where", ["kernel", "operation", "module"])
def test_whatever_looks_like_moe_is_never_called_no_moe(tmp_path, where):
    name = {
        "kernel": "acme_moe_swizzle_17",
        "operation": "acme::moe_magic",
        "module": "Acme3MoeForCausalLM_0",
    }[where]
    events = [
        *([module(name, 0, 100)] if where == "module" else []),
        *([operation(name, 0, 100)] if where == "operation" else []),
        *launched(1, name if where == "kernel" else "plain", 20, 50, 30),
    ]
    found = diagnosed(tmp_path, events)
    assert found.status == MOE_UNMODELED
    assert found.moe_ns == (0 if where == "module" else 30_000)
    assert bool(found.hinted) == (where == "module")


def test_a_profile_without_modules_says_what_it_cannot_know(tmp_path):
    found = diagnosed(tmp_path, [operation("aten::mm", 0, 9), *launched(1, "gemm", 1, 20, 3)])
    assert found.status == NO_MOE and any("with_stack=True" in note for note in found.notes)


def test_launches_of_driver_and_runtime_count_and_the_wrapping_module_does_not(tmp_path):
    """As vLLM runs it: a module round the operation pads before it and reduces after it."""
    driver = span("cuda_driver", "cuLaunchKernelEx", 32, 1, correlation=3)
    events = [
        module("FusedMoE_0", 0, 100), *launched(1, "pad", 5, 200, 7),
        operation("vllm::moe_forward", 10, 50, [[8, 64], [8, 4], []]),
        *launched(2, "routingKernel", 20, 210, 11), driver, {**launched(3, "acme_bmm", 0, 225, 13)[1]},
        *launched(4, "all_reduce", 90, 240, 17),
    ]  # fmt: skip
    found = diagnosed(tmp_path, events)
    assert found.moe_ns == 24_000 and found.times.beside_ns == 24_000
    assert found.times.n_moe_kernels == 2 and found.n_layers == 1


def test_overlap_counts_in_kernel_time_and_not_in_busy_or_elapsed_time(tmp_path):
    events = [
        operation("vllm::moe_forward", 0, 50, [[8, 64], [8, 4], []]),
        *launched(1, "a", 1, 100, 10), *launched(2, "b", 2, 105, 10), *launched(3, "c", 60, 195, 5),
    ]  # fmt: skip
    times = diagnosed(tmp_path, events).times
    assert (times.moe_kernel_ns, times.moe_busy_ns) == (20_000, 15_000)
    assert (times.kernel_ns, times.busy_ns, times.elapsed_ns) == (25_000, 20_000, 100_000)


def test_layers_of_a_captured_graph_are_told_apart_by_the_order_of_kernels(tmp_path):
    layer = ["_topk_forward", "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x128x256x1_swiglu",
             "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x128x256x1", "_finalize_matmul_scatter_bf16", "attention"]  # fmt: skip
    events = [span("cuda_runtime", "cudaGraphLaunch", 0, 5, correlation=9)]
    for i, name in enumerate(layer * 3):
        events.append(launched(9, name, 0, 10.0 * (i + 1), 4)[1])
    found = diagnosed(tmp_path, events)
    assert found.n_layers == 3 and found.layer_us.kernels.tolist() == [4, 4, 4]
    assert found.times.n_moe_kernels == 12 and {op.told_by for op in found.operations} == {
        "kernel name"
    }


def test_two_products_that_share_a_name_are_first_up_then_down(tmp_path):
    names = [
        "moe_align_block_size_kernel",
        "fused_moe_kernel",
        "silu",
        "fused_moe_kernel",
        "moe_sum_kernel",
    ]
    events = [span("cuda_runtime", "hipGraphLaunch", 0, 5, correlation=9)]
    events += [launched(9, name, 0, 10.0 * (i + 1), i + 1)[1] for i, name in enumerate(names)]
    found = diagnosed(tmp_path, events)
    assert {op.role: op.time_ns for op in found.operations if op.role in ("up", "down")} == {
        "up": 2000,
        "down": 4000,
    }


def test_gradients_belong_to_the_layer_of_their_forward_operation(tmp_path):
    forward = operation(
        "aten::mm", 20, 10, [[8, 4], [4, 8]], **{"Sequence number": 5, "Fwd thread id": 0}
    )
    backward = operation(
        "autograd::MmBackward0", 500, 20, **{"Sequence number": 5, "Fwd thread id": 1}
    )
    other = operation(
        "autograd::AddBackward0", 600, 20, **{"Sequence number": 6, "Fwd thread id": 1}
    )
    events = [
        module("MixtralSparseMoeBlock_0", 10, 50), forward, *launched(1, "gemm", 22, 40, 3), {**backward, "tid": 2},
        {**other, "tid": 2}, *launched(2, "gemm", 505, 520, 6), *launched(3, "add", 605, 620, 9),
    ]  # fmt: skip
    events[6]["tid"] = events[8]["tid"] = 2  # autograd launches on a thread of its own
    found = diagnosed(tmp_path, events)
    assert found.moe_ns == 9_000 and found.times.kernel_ns == 18_000


def test_a_table_of_ones_own_goes_before(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "operations:\n  - {match: '^acme::ffn$', role: experts, dims: [[tokens, hidden], [experts, up, hidden], "
        "[experts, hidden, inner], [tokens, top_k]]}\n"
    )
    dims = [[16, 64], [8, 64, 64], [8, 64, 32], [16, 2]]
    events = [operation("acme::ffn", 0, 50, dims), *launched(1, "k", 5, 60, 9)]
    assert diagnosed(tmp_path, events).status == NO_MOE
    found = diagnosed(tmp_path, events, load_names(own))
    shape = found.operations[0].shape
    assert found.status == OK and found.operations[0].is_modelled
    assert (shape.tokens, shape.hidden, shape.inner, shape.experts, shape.top_k) == (
        16,
        64,
        32,
        8,
        2,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kernel: []", "sections"),
        ("kernels: [{role: up}]", "needs match"),
        ("kernels: [{match: '(', role: up}]", "no regular expression"),
        ("kernels: [{match: 'a', role: boss}]", "role 'boss'"),
        ("kernels: [{match: 'a', colour: red}]", "colour"),
    ],
)
def test_a_table_that_is_none_is_named(tmp_path, text, says):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_names(own)


def test_own_time_is_what_nested_operations_leave(tmp_path):
    events = [
        operation("a", 0, 100),
        operation("b", 10, 30),
        operation("c", 12, 5),
        operation("d", 60, 20),
    ]
    profile = read(written(tmp_path, events), NAMES)
    own = dict(
        zip([profile.trace.names[n] for n in profile.work.name_W], profile.work.took_W, strict=True)
    )
    assert own == {"a": 50_000, "b": 25_000, "c": 5_000, "d": 20_000}
    assert np.sum(profile.work.took_W) == 100_000


def test_a_whole_model_that_is_called_moe_is_not_one_layer(tmp_path):
    events = [
        module("TinyMoE_0", 0, 1000), *launched(1, "attention", 10, 2000, 50),
        module("ToyMoE_0", 100, 50), module("Expert_0", 110, 5), *launched(2, "a", 112, 2100, 3),
        module("Expert_1", 120, 5), *launched(3, "b", 122, 2200, 4), module("ToyMoE_1", 300, 50),
        *launched(4, "c", 310, 2300, 5),
    ]  # fmt: skip
    found = diagnosed(tmp_path, events)
    assert found.moe_ns == 12_000 and found.n_layers == 2


def test_a_grouped_product_on_a_gpu_is_modelled_by_what_it_was_called_with(tmp_path):
    """Of 64 experts 3 rows need 3 at most: the others' weights are not read."""
    dims = [[3, 32], [64, 32, 16]]
    events = [
        module("OlmoeSparseMoeBlock_0", 0, 100), operation("aten::_grouped_mm", 10, 20, dims),
        *launched(1, "void cutlass::GemmUniversal<GroupProblemShape>", 12, 200, 9),
    ]  # fmt: skip
    (op,) = diagnosed(tmp_path, events).operations
    assert op.role == "gemm" and op.cost.flops == 2 * 3 * 32 * 16
    assert 2.9 < op.cost.active_experts < 3
    assert op.cost.n_bytes == pytest.approx(
        2 * (3 * 32 + op.cost.active_experts * 32 * 16 + 3 * 16)
    )


@pytest.mark.parametrize("dims", [None, 5, "x", [[16]], [[16, 0], [8, 64, 64], [8, 64, 32], [16, 2]], [[], [], [], []],
                                  [[4, 8], [2, 8, 8], [2, 8, 4], [4, 99]]])  # fmt: skip
def test_inputs_that_are_no_sizes_cost_nothing_but_the_model(tmp_path, dims):
    event = operation("vllm::rocm_aiter_fused_moe", 0, 50)
    event["args"]["Input Dims"] = dims
    found = diagnosed(tmp_path, [event, *launched(1, "k", 5, 60, 9)])
    assert found.moe_ns == 9_000 and found.status in (OK, MOE_UNMODELED)
