"""Every adapter reads the output that its router class gives; what has another form is refused by name."""

import pytest
import torch
from torch import nn

from prefetch.errors import ConfigError
from prefetch.models.capture import routed_layers
from prefetch.models.routers import ADAPTERS, TRIPLE, adapter_of, read

LOGITS = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])
IDS, WEIGHTS = torch.tensor([[1, 2], [0, 2]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]])


def routing(name, output, block=None):
    found = read(ADAPTERS.get(name, TRIPLE), output, block or nn.Module(), f"{name} of a test")
    return found.ids_NK.tolist(), found.weights_NK, found.scores_NE


def test_the_default_is_logits_weights_ids():
    ids, weights, scores = routing("AnyTopKRouter", (LOGITS, WEIGHTS, IDS))
    assert ids == IDS.tolist()
    assert weights is WEIGHTS and torch.equal(scores, LOGITS)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        None,
        (LOGITS, IDS),
        (LOGITS, WEIGHTS, IDS, LOGITS),
        (LOGITS, IDS, WEIGHTS),
        (LOGITS, WEIGHTS[:1], IDS),
        (LOGITS[:1], WEIGHTS, IDS),
        (LOGITS[:, :1], WEIGHTS, IDS),
        (LOGITS, WEIGHTS > 0, WEIGHTS > 0),
    ],
)
def test_another_form_is_refused_with_the_class_and_what_to_do(output):
    with pytest.raises(
        ConfigError, match=r"router class StrangeRouter of .*ADAPTERS\[\"StrangeRouter\"\]"
    ):
        routing("StrangeRouter", output)


def test_switch_marks_a_token_over_capacity():
    dispatch = torch.tensor([[[0, 1, 0], [0, 0, 0]]])
    ids, weights, _ = routing(
        "SwitchTransformersTop1Router", (dispatch, torch.tensor([[[0.9], [0.8]]]), LOGITS[None])
    )
    assert ids == [[1], [-1]]
    assert weights.flatten().tolist() == pytest.approx([0.9, 0.0])


def test_nllb_marks_choices_over_capacity_and_padding():
    combine = torch.tensor([[0.6, 0.0, 0.4], [0.0, 0.0, 0.7], [0.0, 0.0, 0.0]])
    output = (combine > 0, combine, torch.zeros(3, 3))
    assert routing("NllbMoeTop2Router", output)[0] == [[0, 2], [2, -1], [-1, -1]]


def test_zaya_marks_the_skip_expert():
    logits = torch.zeros(2, 4)
    weights, ids = torch.tensor([[0.5], [0.0]]), torch.tensor([[2], [0]])
    found, _, scores = routing("ZayaRouter", (logits, weights, ids, logits))
    assert found == [[2], [-1]] and scores.shape == (2, 3)


def test_longcat_marks_identity_experts():
    block = nn.Module()
    block.experts = nn.Module()
    block.experts.num_routed_experts = 2
    ids, _, scores = routing("LongcatFlashTopkRouter", (LOGITS, WEIGHTS, IDS), block)
    assert ids == [[1, -1], [0, -1]] and scores.shape == (2, 2)


def test_llama4_chose_where_its_dense_scores_are_not_zero():
    block = nn.Module()
    block.router = nn.Module()
    block.router.top_k = 2
    scores = torch.tensor([[0.0, 0.9, 0.5], [0.8, 0.0, 0.3]])
    ids, weights, logits = routing("Llama4Router", (scores, LOGITS), block)
    assert ids == [[1, 2], [0, 2]] and torch.equal(logits, LOGITS)
    assert torch.equal(weights, torch.tensor([[0.9, 0.5], [0.8, 0.3]]))


def test_jetmoe_unsorts_its_choices():
    order = IDS.flatten().sort(stable=True).indices
    sizes = torch.bincount(IDS.flatten(), minlength=3).tolist()
    output = (order, order // 2, WEIGHTS.flatten()[order], sizes, LOGITS)
    ids, weights, _ = routing("JetMoeTopKGating", output)
    assert ids == IDS.tolist() and torch.equal(weights, WEIGHTS)


def test_every_declared_router_class_of_the_families_has_its_experts_beside_it(
    family, tiny, expected
):
    layers, wanted = routed_layers(tiny(family).model), expected[family]
    assert tuple(layer.number for layer in layers) == wanted.layers
    stacks = {layer.stack for layer in layers}
    assert stacks == ({"encoder", "decoder"} if tiny(family).has_encoder else {"decoder"})
    assert {adapter_of(layer.router) for layer in layers} == {layer.adapter for layer in layers}


def test_a_dense_model_is_refused():
    class Dense(nn.Module):
        config = None

    with pytest.raises(ConfigError, match="Dense declares no router"):
        routed_layers(Dense())
