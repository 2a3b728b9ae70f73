"""Captures of every family: ids are what really ran, padding is left out, and decode equals teacher forcing."""

import itertools

import numpy as np
import pytest
import torch

from prefetch.errors import FormatError
from prefetch.models.batches import Capture, Wanted
from prefetch.models.capture import RouterHooks, decide
from prefetch.models.hf import LoadedModel
from prefetch.models.measured import router_matrix

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 128, size=n).tolist() for n in (9, 5, 7)]
# transformers 5.23 gives NLLB's 0/1 mask where its experts read ids, so that only experts 0 and 1 run.
BROKEN_EXPERTS = {"nllb-moe"}
SPARSE_DROPS = {"longcat_flash", "zaya", "nllb-moe", "switch_transformers"}
NO_PADDING = {"deepseek_v4"}  # it compresses its cache by fixed windows, which left padding moves
# Which of the logits that a model returns belong to which of its layers, where it is not one each, in order.
RETURNED = {"jetmoe": (slice(2, None, 3), [0, 1, 2, 3]), "deepseek_v4": (slice(None), [3])}
OTHER_FUNCTION = {
    "deepseek_v4",
    "phimoe",
    "zaya",
}  # sqrt of softplus, sparsemixer, a class too many


def test_ids_are_in_range_distinct_and_controlled(family, tiny, expected):
    capture, wanted = Capture(tiny(family), Wanted()), expected[family]
    rows = capture.rows(PROMPTS, new_tokens=0)
    ids, weights, card = rows["ids_TLK"], rows["weights_TLK"], capture.card
    assert ids.shape == weights.shape == (21, len(wanted.layers), wanted.top_k)
    assert (card.n_experts, card.top_k) == (wanted.n_experts, wanted.top_k)
    assert ids.max() < card.n_experts and np.isfinite(weights).all()
    ran = np.array(
        [
            stack == ("encoder" if tiny(family).has_encoder else "decoder")
            for stack in card.layer_stacks
        ]
    )
    if family not in SPARSE_DROPS:
        assert ids[:, ran].min() >= 0
    in_order = np.sort(ids[:, ran], axis=-1)
    assert ((in_order[..., 1:] != in_order[..., :-1]) | (in_order[..., 1:] < 0)).all()
    assert len(np.unique(ids[:, ran])) > 2
    assert capture.reproduced == capture.decisions > 0
    assert bool(capture.unheard) == (family in BROKEN_EXPERTS)
    assert rows["token_T"].tolist() == list(itertools.chain(*PROMPTS))
    assert rows["request_T"].tolist() == [0] * 9 + [1] * 5 + [2] * 7
    assert (card.score_function == "other") == (family in OTHER_FUNCTION)


def test_a_request_is_routed_in_a_batch_as_it_is_alone(family, tiny):
    capture = Capture(tiny(family), Wanted())
    together = capture.rows(PROMPTS, new_tokens=0)
    alone = [capture.rows([prompt], new_tokens=0)["ids_TLK"] for prompt in PROMPTS]
    assert (together["ids_TLK"] == np.concatenate(alone)).all()


def test_decode_equals_teacher_forcing(family, tiny):
    if tiny(family).has_encoder:
        pytest.skip("its decoder has no prompt")
    capture = Capture(tiny(family), Wanted())
    batches = [[prompt] for prompt in PROMPTS] if family in NO_PADDING else [PROMPTS]
    runs = [capture.rows(batch, new_tokens=3) for batch in batches]
    for first, run in enumerate(runs):
        run["request_T"] = run["request_T"] + first
    rows = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    split = np.flatnonzero(np.diff(rows["request_T"])) + 1
    texts = [part.tolist() for part in np.split(rows["token_T"], split)]
    assert [text[: len(prompt)] for text, prompt in zip(texts, PROMPTS, strict=True)] == PROMPTS
    assert all(len(text) <= len(prompt) + 3 for text, prompt in zip(texts, PROMPTS, strict=True))
    phases = np.concatenate(
        [np.arange(len(text)) >= len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)]
    )
    assert (rows["phase_T"] == phases).all()
    forced = np.concatenate([capture.rows([text], new_tokens=0)["ids_TLK"] for text in texts])
    assert (rows["ids_TLK"] == forced).all()


def test_scores_are_the_logits_that_the_model_itself_returns(family, tiny):
    loaded, prompt = tiny(family), PROMPTS[0]
    given = torch.tensor([prompt])
    with torch.no_grad():
        if loaded.has_encoder:
            output = loaded.model(
                input_ids=given, decoder_input_ids=given, output_router_logits=True
            )
            logits = output.encoder_router_logits
        else:
            logits = loaded.model.base_model(
                input_ids=given, output_router_logits=True
            ).router_logits
    scores = Capture(loaded, Wanted(scores=0)).rows([prompt], 0)["scores_TLM"]
    part, layers = RETURNED.get(family, (slice(None), range(len(logits))))
    for layer, own in zip(layers, logits[part], strict=True):
        own = own.reshape(len(prompt), -1)[:, : scores.shape[2]]
        assert (scores[:, layer] == own.to(torch.float16).numpy()).all()


def first_run(loaded: LoadedModel, token: int) -> torch.Tensor:
    model = loaded.model.get_encoder() if loaded.has_encoder else loaded.model.base_model
    with torch.no_grad():
        return model(input_ids=torch.tensor([[token]]), use_cache=False)[0]


def silence(experts: torch.nn.Module, ids: list[int], n_experts: int) -> None:
    """Sets these experts' weights to zero, whether they are slices or modules."""
    if isinstance(experts, torch.nn.ModuleDict):
        for expert in ids:
            silence(experts[f"expert_{expert}"], [0], 1)
        return
    for weight in experts.parameters():
        rows = n_experts if len(weight) % n_experts == 0 else len(weight)
        weight.data.view(rows, -1)[ids] = 0


def test_only_the_recorded_experts_matter(family, tiny):
    """Without the others the output is the same; without the recorded ones it is another."""
    if family in BROKEN_EXPERTS:
        pytest.skip("this version of transformers runs other experts, and the capture says so")
    loaded, token = tiny(family), 17
    capture = Capture(loaded, Wanted())
    rows = capture.rows([[token]], 0)
    ids, is_felt_L = rows["ids_TLK"], (rows["weights_TLK"][0] > 0.01).all(axis=1)
    slot = int(((ids[0] >= 0).all(axis=1) & is_felt_L).argmax())
    chosen, layer = ids[0, slot].tolist(), capture.hooks.layers[slot]
    others = [expert for expert in range(8) if expert not in chosen]
    whole = first_run(loaded, token)
    for silenced, is_same in ((others, True), (chosen, False)):
        kept = {child: getattr(layer.block, child).state_dict() for child in layer.adapter.experts}
        kept = {child: {n: t.clone() for n, t in state.items()} for child, state in kept.items()}
        for child in layer.adapter.experts:
            silence(getattr(layer.block, child), silenced, 8)
        assert torch.equal(first_run(loaded, token), whole) == is_same
        for child, state in kept.items():
            getattr(layer.block, child).load_state_dict(state)


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe"])
def test_both_stacks_of_an_encoder_decoder(name, tiny):
    capture = Capture(tiny(name), Wanted(scores=3, gate_inputs=True))
    rows = capture.rows(PROMPTS, new_tokens=4)
    ids, phase = rows["ids_TLK"], rows["phase_T"]
    assert capture.card.layer_stacks == ("encoder", "encoder", "decoder", "decoder")
    assert (ids[phase == 0][:, 2:] == -1).all() and (ids[phase == 1][:, :2] == -1).all()
    assert (ids[phase == 1][:, 2:, 0] >= 0).any()
    assert (phase == 0).sum() == 21 and 3 <= (phase == 1).sum() <= 12
    assert (rows["score_ids_TLM"][phase == 0][:, 2:] == -1).all()
    assert not rows["gate_inputs_TLD"][phase == 1][:, :2].any()
    for request in range(3):
        assert (np.diff(phase[rows["request_T"] == request].astype(int)) >= 0).all()


def test_sampling_takes_its_seed_from_the_generator(tiny):
    def sampled(seed: int) -> list[int]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            capture = Capture(tiny("mixtral"), Wanted(), temperature=1.0)
            return capture.rows(PROMPTS, new_tokens=6)["token_T"].tolist()

    assert sampled(1) == sampled(1) != sampled(2)


def test_best_scores_carry_their_ids_and_gate_inputs_their_router(tiny):
    capture = Capture(tiny("olmoe"), Wanted(scores=3, gate_inputs=True))
    rows = capture.rows(PROMPTS, new_tokens=0)
    assert (rows["score_ids_TLM"][..., :2] == rows["ids_TLK"]).all()  # a plain softmax router
    for slot, layer in enumerate(capture.hooks.layers):
        matrix = router_matrix(layer, capture.card)
        assert matrix is not None
        logits = rows["gate_inputs_TLD"][:, slot].astype(np.float32) @ matrix.numpy().T
        best = np.sort(logits, axis=1)[:, ::-1][:, :3]
        np.testing.assert_allclose(
            best, rows["scores_TLM"][:, slot], rtol=5e-3, atol=5e-3
        )  # float16


def test_the_card_is_counted_on_the_parameters(family, tiny):
    loaded = tiny(family)
    capture = Capture(loaded, Wanted())
    capture.rows(PROMPTS, 0)
    card = capture.card
    total = sum(weight.numel() * weight.element_size() for weight in loaded.model.parameters())
    parts = card.dense_bytes + card.shared_bytes + 8 * sum(card.expert_bytes_L)
    assert 0 <= total - parts < 8 * card.n_layers  # bytes of one expert are rounded down
    assert card.expert_precision == card.routed_precision == "fp32"
    assert card.hidden_size == 32 and card.kv_bytes_per_token > 0


def test_ids_that_the_experts_did_not_get_are_an_error(tiny):
    loaded = tiny("mixtral")
    with RouterHooks(loaded.model) as hooks, torch.no_grad():
        loaded.model.base_model(input_ids=torch.tensor(PROMPTS[:1]))
        calls = hooks.take()
    calls[0].heard_ids = calls[0].heard_ids.flip(1)
    with pytest.raises(
        FormatError, match="MixtralTopKRouter of decoder layer 0: its experts must receive"
    ):
        decide(hooks.layers[0], calls[0])


def test_the_own_gate_control_sees_another_gate_input(tiny):
    loaded = tiny("mixtral")
    with RouterHooks(loaded.model) as hooks, torch.no_grad():
        loaded.model.base_model(input_ids=torch.tensor(PROMPTS[:1]))
        calls = hooks.take()
        calls[1].args = (calls[1].args[0].flip(0),)
        assert decide(hooks.layers[0], calls[0]).own_gate_N.all()
        assert not decide(hooks.layers[1], calls[1]).own_gate_N.all()


def test_hooks_are_gone_afterwards(tiny):
    loaded = tiny("mixtral")
    Capture(loaded, Wanted()).rows(PROMPTS, 2)
    hooks = [
        hook
        for module in loaded.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert not [hook for hook in hooks if hook.__module__.startswith("prefetch")]
