"""Models of several families run from a pool that is too small for their experts, and say the same, bit for bit."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir

from prefetch import config
from prefetch.artifacts import Store
from prefetch.engine.arena import Arena, PinError
from prefetch.engine.backend import EngineError
from prefetch.engine.offloaded import OffloadedMoE
from prefetch.errors import ConfigError
from prefetch.predict import train
from prefetch.runs.outputs import Outputs
from prefetch.sim.engines.pool import HIT
from prefetch.sim.engines.run import replay
from prefetch.sim.policies.belady import Belady
from prefetch.sim.policies.lfu import Lfu
from prefetch.sim.policies.lru import Lru
from prefetch.sim.workload import workload_of
from prefetch.trace.routing import DECODE, PREFILL, trace_of
from prefetch.tracking import NoTracker

SMALL = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200, "head_dim": 12, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 20, "num_experts": 12, "num_experts_per_tok": 3},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {
        "moe_intermediate_size": 20, "n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 12, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    },
    "olmoe": {"num_experts": 12, "num_experts_per_tok": 3},
}  # fmt: skip
CAPACITIES = {"one layer's k": None, "a half": 0.5, "everything": 1.0}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def said(model: Any, tokens: int = 10, batch: int = 2) -> tuple[Any, list[Any]]:
    prompt = torch.randint(200, (batch, 7), generator=torch.Generator().manual_seed(1))
    out = model.generate(
        prompt,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, list(out.logits)


@cache
def untouched(family: str) -> tuple[Any, list[Any]]:
    return said(model_of(family))


def is_same(one: tuple[Any, list[Any]], other: tuple[Any, list[Any]]) -> bool:
    logits = zip(one[1], other[1], strict=True)
    return torch.equal(one[0], other[0]) and all(torch.equal(a, b) for a, b in logits)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_the_untouched_models_bit_for_bit(family, capacity):
    top_k = FAMILIES[family]["num_experts_per_tok"]
    offloaded = OffloadedMoE(model_of(family), capacity=CAPACITIES[capacity] or top_k)
    assert is_same(said(offloaded), untouched(family))
    counts, card = offloaded.counts(), offloaded.card
    each = card.expert_bytes_L[0]
    assert counts["moved_bytes"] == counts["misses"] * each > 0
    assert (
        offloaded.device_bytes
        == (len(offloaded.engine.slot_of) + len(offloaded.engine.free)) * each
    )
    if capacity == "everything":
        assert counts["misses"] == len(offloaded.engine.slot_of) <= card.n_layers * card.n_experts
    assert is_same(said(offloaded.restore()), untouched(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_by_the_kernels_definitions_outputs_are_close(family):
    """What a GPU computes: another order of sums, the same tokens, and the model comes back whole."""
    offloaded = OffloadedMoE(model_of(family), capacity=0.5, uses_kernels=True)
    tokens, logits = said(offloaded)
    expected_tokens, expected = untouched(family)
    assert torch.equal(tokens, expected_tokens)
    for found, true in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
    assert offloaded.counts()["hits"] > 0
    assert is_same(said(offloaded.restore()), untouched(family))


def test_once_all_experts_are_there_nobody_is_asked():
    offloaded = OffloadedMoE(model_of("mixtral"), capacity=1.0, uses_kernels=True)
    prompt = torch.arange(160).reshape(8, 20)
    offloaded(prompt)
    assert offloaded.counts()["misses"] == 3 * 8 and offloaded.counts()["resident_events"] == 0
    found = offloaded(prompt).logits
    assert offloaded.counts()["resident_events"] == 3 and offloaded.counts()["hits"] == 0
    torch.testing.assert_close(found, model_of("mixtral")(prompt).logits, rtol=1e-4, atol=1e-5)


def test_inference_mode_is_no_other_world():
    model = model_of("mixtral")
    with torch.inference_mode():
        offloaded = OffloadedMoE(model, capacity=2)
    assert is_same(said(offloaded), untouched("mixtral"))


def test_experts_leave_the_model():
    model = model_of("qwen3_moe")
    whole = sum(param.numel() for param in model.parameters())
    offloaded = OffloadedMoE(model, capacity=0.25)
    left = sum(param.numel() for param in model.parameters())
    blocks = offloaded.packed_L[0]
    assert whole - left == 3 * 12 * (
        blocks.parts[0].stop + blocks.parts[1].stop - blocks.parts[1].start
    )
    assert offloaded.device_bytes == (3 * 3 + 2) * blocks.bytes


@pytest.mark.parametrize("policy", [Lru(), Lfu()])
@pytest.mark.parametrize("scope", ["per_layer", "global"])
def test_hits_are_the_simulators_on_the_same_routing(policy, scope):
    offloaded = OffloadedMoE(model_of("qwen3_moe"), capacity=0.5, scope=scope, policy=policy)
    seen: list[Any] = []
    told = offloaded.engine.layer
    offloaded.engine.layer = lambda layer, ids: (seen.append(ids.copy()), told(layer, ids))[1]
    said(offloaded, batch=1)
    steps = [np.stack(seen[at : at + 3], axis=1) for at in range(0, len(seen), 3)]
    ids_TLK = np.concatenate(steps)
    phase_T = np.where(np.arange(len(ids_TLK)) < len(steps[0]), PREFILL, DECODE)
    work = workload_of(trace_of(offloaded.card, ids_TLK, phase_T=phase_T))
    room_G = [18] if scope == "global" else [6, 6, 6]
    outcome_A = replay(work, policy, room_G, [1, 1, 1])
    counts = offloaded.counts()
    assert (counts["hits"], counts["misses"]) == (
        (outcome_A == HIT).sum(),
        (outcome_A != HIT).sum(),
    )


class Again:
    """Guesses what this layer was told last."""

    def __init__(self, n_experts: int) -> None:
        self.last = np.zeros((3, n_experts), np.float32)

    def start(self) -> None:
        self.last[:] = 0

    def observe(self, layer: int, ids: Any, gate_input: Any = None) -> None:
        self.last[layer] = 0
        self.last[layer, ids] = 1

    def guess(self, layer: int) -> Any:
        return self.last[layer]


class Guesser:
    def online(self, horizon: int) -> Again:
        return Again(12)


@pytest.mark.parametrize("batch", [1, 2])
def test_guesses_are_copied_ahead_and_change_no_output(batch):
    model = model_of("qwen3_moe")
    expected = said(model, batch=batch)
    offloaded = OffloadedMoE(model, capacity=0.5, predictor=Guesser(), horizon=1)
    assert is_same(said(offloaded, batch=batch), expected)
    assert is_same(said(offloaded, batch=batch), expected)
    counts = offloaded.counts()
    assert counts["prefetch_loads"] > 0 and counts["prefetch_used"] > 0
    each = offloaded.card.expert_bytes_L[0]
    assert counts["moved_bytes"] == (counts["misses"] + counts["prefetch_loads"]) * each


def exported(tmp_path: Any) -> Any:
    """The file of a predictor of such a model; what it has learnt does not matter."""
    words = [
        "stage=train", "source=synthetic", "source.n_requests=10", "source.n_layers=3", "source.n_experts=12",
        "source.top_k=3", "predictor=previous_token", "train.export=true", "train.folds=1", "train.baselines=none",
        "train.figures=false", "train.horizons=[2]", f"store={tmp_path / 'store'}",
    ]  # fmt: skip
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = cast(config.Config, compose("config", overrides=words))
    train.run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(tmp_path / "run", NoTracker()))
    return next((tmp_path / "run").rglob("predictor.safetensors"))


def test_an_exported_predictor_is_asked_as_it_lies(tmp_path):
    path = exported(tmp_path)
    offloaded = OffloadedMoE(model_of("qwen3_moe"), capacity=4, predictor=path, horizon=2)
    found = said(offloaded)
    assert is_same(found, untouched("qwen3_moe")) and is_same(said(offloaded), found)
    assert offloaded.counts()["prefetch_loads"] > 0
    with pytest.raises(ConfigError, match="horizon 1: was not learnt"):
        OffloadedMoE(model_of("qwen3_moe"), predictor=str(path), horizon=1)
    with pytest.raises(
        ConfigError, match=r"learnt on 3 layers of 12 experts, k = 3; the model has 3 of 8, k = 2"
    ):
        OffloadedMoE(model_of("mixtral"), predictor=path, horizon=2)


def test_a_failing_copy_is_an_error_and_no_hang():
    offloaded = OffloadedMoE(model_of("mixtral"), capacity=2)
    offloaded.host_LEN[1] = offloaded.host_LEN[1][:, :-16]
    with pytest.raises(EngineError, match=r"a copy failed: layer 1 expert \d into slot"):
        said(offloaded)


def test_an_interrupted_pass_is_not_gone_on_with():
    """Ctrl-C in the middle of a layer: the next request runs, and says what it would have said."""
    offloaded = OffloadedMoE(model_of("qwen3_moe"), capacity=3)
    launch, calls = offloaded.body.launch, iter(range(10**6))

    def interrupted(*told: Any) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt
        launch(*told)

    offloaded.body.launch = interrupted
    with pytest.raises(KeyboardInterrupt):
        said(offloaded)
    offloaded.body.launch = launch
    assert is_same(said(offloaded), untouched("qwen3_moe"))
    engine = offloaded.engine
    assert len(engine.slot_of) + len(engine.free) == len(offloaded.pool_SN)


def test_training_is_refused():
    model = model_of("mixtral").train()
    offloaded = OffloadedMoE(model, capacity=2)
    with pytest.raises(ConfigError, match="serves and does not train"):
        offloaded(torch.arange(6)[None])


def test_whoever_forgets_the_model_forgets_its_thread():
    gc.collect()
    before = threading.active_count()
    offloaded = OffloadedMoE(model_of("mixtral"), capacity=2)
    assert threading.active_count() == before + 1
    del offloaded
    gc.collect()
    assert threading.active_count() == before


def test_padding_is_no_history():
    """Of a prompt that is padded on the left predictors see the tokens."""
    seen: list[int] = []

    class Counts(Again):
        def observe(self, layer: int, ids: Any, gate_input: Any = None) -> None:
            seen.append(layer)
            super().observe(layer, ids)

    class Watches:
        def online(self, horizon: int) -> Counts:
            return Counts(12)

    offloaded = OffloadedMoE(model_of("qwen3_moe"), capacity=0.5, predictor=Watches(), horizon=1)
    prompt, mask = torch.arange(14).reshape(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        offloaded(input_ids=prompt, attention_mask=mask)
    assert len(seen) == 3 * (7 + 2)


@pytest.mark.parametrize(
    ("told", "said_of_it"),
    [
        ({"capacity": 0, "staging": 0}, "capacity=0 holds no expert and staging=0"),
        ({"capacity": 99}, "has 12 experts in a layer"),
        ({"policy": Belady()}, "needs future, which a model that runs does not tell"),
        ({"policy": "best"}, "policy 'best': there are .*lru"),
        ({"device": "tpu"}, "expected auto, cpu, cuda or cuda:N"),
        ({"scope": "layer"}, "expected one of per_layer, global"),
        ({"staging": "2"}, "staging='2': expected a whole number from 0 on"),
        ({"width": -1}, "width=-1: expected a whole number"),
        ({"policy": 3}, "policy=3: expected a name"),
        ({"predictor": object()}, "cannot be asked event by event"),
        ({"predictor": "nowhere.safetensors"}, "predictor=nowhere.safetensors: "),
        ({"predictor": Guesser(), "horizon": 9}, "expected 1 to 3 layers ahead"),
    ],
)
def test_what_cannot_be_is_said(told, said_of_it):
    with pytest.raises(ConfigError, match=said_of_it):
        OffloadedMoE(model_of("qwen3_moe"), **told)


def test_an_offloaded_model_is_not_offloaded_again_nor_saved(tmp_path):
    offloaded = OffloadedMoE(model_of("gpt_oss"), capacity=2)
    for again in (offloaded, offloaded.model):
        with pytest.raises(ConfigError, match="offloaded already"):
            OffloadedMoE(again)
    with pytest.raises(ConfigError, match="holds no weights while its model is offloaded"):
        offloaded.model.save_pretrained(tmp_path)
    offloaded.restore().save_pretrained(tmp_path)
    assert offloaded.restore() is offloaded.model


def test_two_threads_take_turns():
    """Passes of several threads are run one after the other: each says what it says alone."""
    offloaded, found = OffloadedMoE(model_of("mixtral"), capacity=2), list[Any]()
    threads = [threading.Thread(target=lambda: found.append(said(offloaded))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 3 and all(is_same(one, untouched("mixtral")) for one in found)


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match="no layer holds its experts"):
        OffloadedMoE(torch.nn.Linear(3, 3))
    strange = model_of("qwen3_moe")
    experts = strange.model.layers[0].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    with pytest.raises(ConfigError, match="does not compute its experts one by one"):
        OffloadedMoE(strange)


@pytest.mark.parametrize("change", ["half", "to_bf16", "double", "meta"])
@pytest.mark.parametrize("of_whom", ["offloaded", "model", "part"])
def test_a_cast_or_a_move_is_refused_before_anything_changes(change, of_whom):
    offloaded = OffloadedMoE(model_of("qwen3_moe"), capacity=3)
    asked = {"offloaded": offloaded, "model": offloaded.model, "part": offloaded.model.model}
    changes = {"half": {"dtype": torch.half}, "to_bf16": {"dtype": torch.bfloat16}, "double": {"dtype": torch.double},
               "meta": {"device": "meta"}}  # fmt: skip
    with pytest.raises(ConfigError, match=r"restore\(\) the model, cast it, and offload it again"):
        asked[of_whom].to(**changes[change])
    assert is_same(said(offloaded), untouched("qwen3_moe"))
    asked[of_whom].to("cpu", torch.float32)  # as it is
    assert is_same(said(offloaded), untouched("qwen3_moe"))
    model = offloaded.restore()
    assert next(model.half().parameters()).dtype == torch.half


def _asked_in_a_fork(offloaded: Any, answers: Any) -> None:
    for ask in (lambda: offloaded(torch.arange(4)[None]), offloaded.restore):
        try:
            ask()
        except ConfigError as error:
            answers.put(str(error))


def test_after_a_fork_it_is_said_and_nobody_waits():
    offloaded = OffloadedMoE(model_of("qwen3_moe"), capacity=3)
    with offloaded._passes:  # another thread's pass, as the process forks
        forks = multiprocessing.get_context("fork")
        answers = forks.SimpleQueue()
        child = forks.Process(target=_asked_in_a_fork, args=(offloaded, answers), daemon=True)
        child.start()
        child.join(60)
    assert child.exitcode == 0
    for _ in range(2):
        told = answers.get()
        assert f"offloaded in process {os.getpid()} and is used in {child.pid}" in told
    assert is_same(said(offloaded), untouched("qwen3_moe"))


def test_a_model_that_finds_no_memory_is_left_as_it_was(monkeypatch):
    """The third layer's experts cannot be pinned."""
    model, held = model_of("qwen3_moe"), iter(range(9))

    def hold(_arena: Any, block: Any) -> Any:
        if next(held) == 2:
            raise PinError("no memory")
        return block

    monkeypatch.setattr(Arena, "hold", hold)
    with pytest.raises(PinError, match="no memory"):
        OffloadedMoE(model, capacity=3)
    monkeypatch.undo()
    assert is_same(said(model), untouched("qwen3_moe"))
    assert is_same(said(OffloadedMoE(model, capacity=3)), untouched("qwen3_moe"))
