"""Two linear layers on the input of attention, taught to rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_traces import check_causal, check_restored, check_same_bytes, recall, recorded, routed
from torch import nn

from prefetch.predict.networks.nets import against_others
from prefetch.predict.part import whole
from prefetch.predict.past import Past
from prefetch.predict.pre_attention import PreAttention

QUICK = {"hidden": 8, "epochs": 2, "batch": 64}


def test_at_horizon_one_even_the_first_layer_is_told() -> None:
    """Here the input of attention is what the router of that layer will read: linear, and found."""
    told, asked = routed(0, 1600, drift=0.5)[0], routed(1, drift=0.5)[0]
    fitted = PreAttention((1, 2), hidden=32, epochs=5, batch=64).fit(whole(told), whole(asked))
    one, two = (recall(fitted.scores(Past(asked, horizon)), asked, 0) for horizon in (1, 2))
    assert one > 0.9 > two
    first_TE = fitted.scores(Past(asked, 2))[:, 0]
    assert (first_TE == fitted.popular_LE_[0]).all()


@pytest.mark.parametrize("activation", [False, True])
def test_what_every_predictor_owes(tmp_path: Path, activation: bool) -> None:
    trace, other = recorded(0), recorded(1)
    given = {**QUICK, "activation": activation}
    fitted = PreAttention((1, 2), **given).fit(whole(trace), whole(other))
    check_same_bytes(fitted, PreAttention((1, 2), **given).fit(whole(trace), whole(other)))
    check_restored(fitted, PreAttention((1, 2), **given), trace, tmp_path)
    check_causal(fitted, trace, other)


class Said(nn.Module):
    """Scores that were thought up."""

    def __init__(self, logits_BLE: torch.Tensor) -> None:
        super().__init__()
        self.logits_BLE = nn.Parameter(logits_BLE)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.logits_BLE


def test_the_loss_equals_its_definition() -> None:
    """-log of the softmax of a chosen expert among itself and those not chosen; rows that never ran are not taught."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 2, 5))
    ids = np.array([[[0, 3], [1, 255]], [[4, 2], [255, 255]], [[1, 0], [2, 3]]])
    lost, rows = 0.0, 0
    for row_E, ids_K in zip(logits.reshape(6, 5), ids.reshape(6, 2), strict=True):
        chosen = {int(i) for i in ids_K if i < 5}
        others = [np.exp(row_E[e]) for e in range(5) if e not in chosen]
        lost -= sum(np.log(np.exp(row_E[e]) / (np.exp(row_E[e]) + sum(others))) for e in chosen)
        rows += bool(chosen)
    batch = torch.ones(3, 2, 4), torch.from_numpy(ids)
    found = against_others(Said(torch.from_numpy(logits)), batch)
    assert float(found.detach()) == pytest.approx(lost / rows, abs=1e-6)


def test_where_all_experts_are_chosen_there_is_nothing_to_lose() -> None:
    net = Said(torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0)))
    loss = against_others(net, (torch.ones(2, 1, 4), torch.tensor([[[0, 1, 2]], [[2, 0, 1]]])))
    loss.backward()
    assert float(loss.detach()) == 0.0 and torch.isfinite(net.logits_BLE.grad).all()
