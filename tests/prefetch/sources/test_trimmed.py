"""A trimmed trace has the first layers and the heaviest choices of the whole, request by request."""

import numpy as np
import pytest

from prefetch.errors import ConfigError
from prefetch.sources.synthetic import Synthetic
from prefetch.sources.trimmed import Trimmed, trimmed
from prefetch.trace.card import plain_card
from prefetch.trace.routing import trace_of


def test_first_layers_and_choices_of_every_row(collect):
    whole = collect(Synthetic(n_requests=4, prompt_tokens=3, new_tokens=2, n_layers=5, top_k=4))
    source = Trimmed(path=str(whole.folder), n_layers=3, top_k=2)
    part = collect(source, upstream={"trace": whole.folder})
    a, b = whole.load(), part.load()
    assert (b.ids_TLK == a.ids_TLK[:, :3, :2]).all()
    assert (b.request_T == a.request_T).all() and (b.phase_T == a.phase_T).all()
    assert part.card.layer_numbers == (0, 1, 2) and part.card.top_k == 2
    assert part.provenance.kind == "synthetic"  # trimming makes nothing real


def test_with_weights_the_heaviest_stay():
    card = plain_card("small", n_experts=8, top_k=3, layer_numbers=(0,))
    ids, weights = np.array([[[5, 1, 7]]]), np.array([[[0.2, 0.5, 0.3]]], np.float16)
    smaller = plain_card("small", n_experts=8, top_k=2, layer_numbers=(0,))
    left = trimmed(trace_of(card, ids, weights_TLK=weights), smaller)
    assert left.ids_TLK.tolist() == [[[1, 7]]]
    assert left.weights_TLK is not None and left.weights_TLK[0, 0, 0] == np.float16(0.5)


@pytest.mark.parametrize(("name", "value"), [("n_layers", 9), ("top_k", 0), ("top_k", 3)])
def test_more_than_there_is_is_refused(collect, name, value):
    whole = collect(Synthetic(n_requests=1, n_layers=8, top_k=2))
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Trimmed(path=str(whole.folder), **{name: value})


def test_a_path_must_be_given():
    with pytest.raises(ConfigError, match=r"source\.path"):
        Trimmed()
