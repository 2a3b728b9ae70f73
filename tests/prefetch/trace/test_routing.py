"""RoutingTrace cannot be wrong: shapes, ranges and widths are checked where it is made."""

import numpy as np
import pytest

from prefetch.errors import FormatError
from prefetch.trace.card import ModelCard, plain_card
from prefetch.trace.routing import id_dtype, no_expert, trace_of

CARD = plain_card("toy", n_experts=4, top_k=2, layer_numbers=(1, 3))


def test_one_byte_while_the_sentinel_is_free():
    assert id_dtype(255) == np.uint8 and no_expert(255) == 255
    assert id_dtype(256) == np.uint16 and no_expert(256) == 65535


def test_minus_one_becomes_no_expert_and_positions_count_within_requests():
    trace = trace_of(CARD, np.array([[[0, 1], [2, -1]]] * 5), request_T=[0, 0, 0, 7, 7], domain="d")
    assert trace.ids_TLK.dtype == np.uint8
    assert trace.ids_TLK[0, 1].tolist() == [2, 255]
    assert trace.position_T.tolist() == [0, 1, 2, 0, 1]
    assert trace.starts_R.tolist() == [0, 3]
    assert trace.domains == ("d",)


@pytest.mark.parametrize("bad", [4, -2, 254])
def test_an_id_out_of_range_is_named_with_its_row(bad):
    with pytest.raises(FormatError, match=rf"row 1, layer slot 0: expert id {bad} is out of range"):
        trace_of(CARD, np.array([[[0, 1], [2, 3]], [[bad, 1], [2, 3]]]))


def test_uint8_ids_are_checked_too():
    ids = np.array([[[0, 1], [2, 200]]], np.uint8)
    with pytest.raises(FormatError, match="row 0, layer 3: expert id 200"):
        trace_of(CARD, ids)


def test_arrays_of_other_lengths_and_shapes_are_refused():
    ids = np.zeros((3, 2, 2), np.uint8)
    with pytest.raises(FormatError, match=r"weights_TLK of toy: expected \[3, 2, 2\] of float16"):
        trace_of(CARD, ids, weights_TLK=np.zeros((3, 2, 1)))
    with pytest.raises(FormatError, match=r"gate_inputs_TLD of toy: expected \[3, 2, 'any'\]"):
        trace_of(CARD, ids, gate_inputs_TLD=np.zeros((2, 2, 8), np.float16))
    with pytest.raises(FormatError, match=r"ids_TLK of toy: expected \[3, 2, 2\]"):
        trace_of(CARD, np.zeros((3, 1, 2), np.uint8))


def test_rows_keeps_every_array_aligned():
    trace = trace_of(CARD, np.zeros((4, 2, 2), np.uint8), token_T=[5, 6, 7, 8])
    assert trace.rows(slice(1, 3)).token_T.tolist() == [6, 7]


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"top_k": 5}, "top_k must be from 1 to n_experts=4"),
        ({"layer_stacks": ("decoder",)}, "one stack per layer"),
        ({"layer_stacks": ("decoder", "middle")}, "must be among"),
        ({"layer_numbers": (1, 1)}, "only once"),
        ({"expert_bytes_L": (5,)}, "one positive size per layer"),
        ({"n_experts": 0}, "n_experts must be"),
    ],
)
def test_a_card_states_which_claim_fails(change, claim):
    fields = {**CARD.to_json(), **change}
    with pytest.raises(FormatError, match=claim):
        ModelCard(**fields)


def test_a_card_survives_json_and_refuses_unknown_fields():
    assert ModelCard.from_json(CARD.to_json(), "here") == CARD
    with pytest.raises(FormatError, match="unknown \\['colour'\\], missing \\[\\]"):
        ModelCard.from_json({**CARD.to_json(), "colour": 1}, "here")
