"""What an operation costs, against formulas written out here; the arithmetic that runs; which hardware file judges."""

import pytest

from analysis.device.machine import device_file
from analysis.device.names import load_names
from analysis.device.roofline import Peaks, arithmetic_of, cost_of
from analysis.device.shapes import Given, Known, Shape, scale_bytes, shape_of
from prefetch.models.cards import load_architecture

NAMES = load_names()
M, K, N, E, TOP = 6, 32, 16, 8, 2
SIZES = {"tokens": M, "hidden": K, "inner": N, "experts": E, "top_k": TOP, "gated": True}
BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "mxfp4": 0.5, "fp4": 0.5, "int4": 0.5}
ACTIVE = E * (1 - ((E - TOP) / E) ** M)


@pytest.mark.parametrize("weight", ["bf16", "fp16", "fp8", "mxfp4", "fp4", "int4"])
def test_products_of_experts_by_hand(weight):
    shape = Shape(**SIZES, weight=weight, activation="fp8", output="bf16")
    b, inputs, outputs = BYTES[weight], 1, 2
    by_hand = {
        "experts": (
            3 * 2 * M * TOP * K * N + M * K * (2 * TOP - 1),
            M * K * inputs + 3 * ACTIVE * K * N * b + M * K * outputs,
        ),
        "up": (
            2 * 2 * M * TOP * K * N,
            M * K * inputs + 2 * ACTIVE * K * N * b + M * TOP * N * outputs,
        ),
        "down": (2 * M * TOP * K * N, M * TOP * N * inputs + ACTIVE * K * N * b + M * K * outputs),
    }
    for role, (flops, n_bytes) in by_hand.items():
        cost = cost_of(role, shape)
        assert (cost.flops, cost.n_bytes) == pytest.approx((flops, n_bytes))


def test_everything_round_the_products_by_hand():
    shape = Shape(**SIZES, weight="bf16", activation="fp8", output="bf16")
    by_hand = {
        "router": (2 * M * K * E, 2 * (M * K + E * K + M * E)),
        "routing": (0, 2 * M * E + M * TOP * (4 + 2)),
        "prepare": (0, M * K * (2 + 1)),  # read in bf16, written in fp8
        "permute": (0, M * K * 2 + M * TOP * K * 1),  # read once, written once per expert
        "activation": (0, 2 * M * TOP * (2 * N + N)),
        "combine": (M * K * (2 * TOP - 1), 2 * (M * TOP + M) * K),
        "dispatch": (0, M * K * 1),
        "collect": (0, M * K * 2),
    }
    for role, (flops, n_bytes) in by_hand.items():
        cost = cost_of(role, shape)
        assert (cost.flops, cost.n_bytes) == (flops, n_bytes)
        assert cost.on_network == (role in ("dispatch", "collect"))


def test_a_grouped_product_needs_no_more_experts_than_its_tokens_choose():
    """12 rows are 6 tokens of two different experts each, or 12 that know nothing of each other."""
    rows = Shape(rows=M * TOP, summed=K, width=N, experts=E, local_experts=E)
    assert cost_of("gemm", rows).active_experts == pytest.approx(E * (1 - (1 - 1 / E) ** 12))
    told = Shape(rows=M * TOP, summed=K, width=N, experts=E, local_experts=E, top_k=TOP)
    assert cost_of("gemm", told).active_experts == pytest.approx(ACTIVE)


def test_scales_count_where_the_format_or_the_card_says_how_many():
    card = load_architecture("gpt_oss_20b")
    assert (
        scale_bytes(Known(NAMES), "mxfp4") == 1 / 32 and scale_bytes(Known(NAMES), "fp4") == 1 / 16
    )
    assert scale_bytes(Known(NAMES), "int4") == scale_bytes(Known(NAMES), "bf16") == 0
    assert scale_bytes(Known(NAMES, Given(scales=False), card), "mxfp4") == 0
    with_scales = Shape(**SIZES, weight="mxfp4", activation="bf16", scale_bytes=1 / 32)
    without = Shape(**SIZES, weight="mxfp4", activation="bf16")
    more = cost_of("down", with_scales).n_bytes - cost_of("down", without).n_bytes
    assert more == pytest.approx(ACTIVE * K * N / 32)
    assert "scales of mxfp4 weights: not counted" in without.assumptions("down")
    assert "scales: 0.03125 bytes for each mxfp4 weight" in with_scales.assumptions("down")


@pytest.mark.parametrize(
    ("weight", "activation", "runs_in"),
    [("mxfp4", "bf16", "bf16"), ("mxfp4", "fp8", "fp8"), ("fp4", "fp4", "fp4"), ("mxfp4", "mxfp4", "fp4"),
     ("int4", "fp16", "fp16"), ("int4", "int4", "int8"), ("fp8", "bf16", "bf16"), ("int8", "int8", "int8")],
)  # fmt: skip
def test_the_arithmetic_is_that_of_the_wider_type(weight, activation, runs_in):
    assert arithmetic_of(weight, activation) == runs_in


def test_a_rate_is_the_types_own_else_its_twins_else_the_next_wider_ones():
    peaks = Peaks("x", 1e12, {"fp32": 1.0, "bf16": 7.0, "fp8": 9.0})
    assert peaks.rate("fp16") == (7.0, "fp16") and peaks.rate("fp4") == (9.0, "fp8")
    assert peaks.rate("int8") == (7.0, "bf16")
    both = Peaks("y", 1e12, {"bf16": 708.0, "fp16": 654.0})
    assert both.rate("fp16") == (654.0, "fp16") and both.rate("bf16") == (708.0, "bf16")


def test_the_router_is_computed_in_the_type_that_the_model_runs_in():
    shape = Shape(**SIZES, weight="fp32", activation="fp32", output="fp32")
    assert cost_of("router", shape).arithmetic == "fp32"


def test_weights_that_are_no_whole_multiple_do_not_say_that_nothing_is_gated():
    rule = NAMES.find("operations", "vllm::rocm_aiter_fused_moe").rule
    dims = [[M, K], [E, 3 * N, K], [E, K, N], [M, TOP]]
    shape = shape_of(Known(NAMES), rule, {"Input Dims": dims}, {})
    assert shape.sources["gated"] == "assumed"


def test_a_plain_byte_is_no_int4_and_a_packed_one_is():
    rule = NAMES.find("operations", "vllm::rocm_aiter_fused_moe").rule
    kinds = ["c10::BFloat16", "unsigned char", "unsigned char", "float"]
    for width, weight in ((K, "int8"), (K // 2, "int4")):
        dims = [[M, K], [E, 2 * N, width], [E, K, N], [M, TOP]]
        found = shape_of(Known(NAMES), rule, {"Input Dims": dims, "Input type": kinds}, {})
        assert found.weight == weight


@pytest.mark.parametrize(
    ("name", "file"),
    [("NVIDIA H100 80GB HBM3", "h100_pcie5"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None),
     ("NVIDIA H200", "h200_pcie5"), ("NVIDIA GH200 480GB", None), ("NVIDIA H200 NVL", None),
     ("NVIDIA B200", "b200_pcie5"), ("NVIDIA GB200", None), ("NVIDIA A100 80GB PCIe", "a100_80gb_pcie4"),
     ("NVIDIA A100-SXM4-80GB", None), ("NVIDIA GeForce RTX 4090", "rtx4090_pcie4"),
     ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
     ("NVIDIA GeForce RTX 3060 Ti", None), ("AMD Instinct MI300X", "mi300x_pcie5"), ("AMD Instinct MI325X", None)],
)  # fmt: skip
def test_a_relative_of_a_device_is_not_judged_by_its_file(name, file):
    assert device_file({"deviceProperties": [{"name": name}]}) == file


def test_another_memory_is_another_device():
    told = {"name": "", "numSms": 304, "computeMajor": 9, "totalGlobalMem": 206_141_652_992}
    assert device_file({"deviceProperties": [told]}) == "mi300x_pcie5"
    larger = {**told, "totalGlobalMem": 274_877_906_944}  # an MI325X
    assert device_file({"deviceProperties": [larger]}) is None
