"""The net: grouped experts against a plain loop, causality, and a router that learns from the text."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from prefetch.models.tiny.net import KVCache, Shape, TinyMoE


def make(top_k: int = 2, seed: int = 0) -> TinyMoE:
    shape = Shape(layers=2, experts=6, top_k=top_k, d=32, ff=8, context=16, vocabulary=50)
    return TinyMoE(shape, torch.Generator().manual_seed(seed))


def tokens(n: int, length: int) -> torch.Tensor:
    return torch.randint(50, (n, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n_tokens", [1, 3, 57])
def test_experts_equal_a_plain_loop(n_tokens, top_k=2):
    experts = make().blocks[0].experts
    x_ND = torch.randn(n_tokens, 32, generator=torch.Generator().manual_seed(2))
    _, weights_NK, ids_NK = make(top_k).routers[0](x_ND)
    expected = torch.zeros_like(x_ND)
    for n in range(n_tokens):
        for k in range(top_k):
            e = ids_NK[n, k]
            hidden = functional.relu(x_ND[n] @ experts.up_EDF[e]) ** 2
            expected[n] += weights_NK[n, k] * (hidden @ experts.down_EFD[e])
    assert_close(experts(x_ND, ids_NK, weights_NK), expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_learns_from_the_text(top_k):
    """A renormalised top-1 weight would be the constant 1, with no gradient."""
    net = make(top_k)
    x_BS = tokens(2, 12)
    logits_BSV, routed_L = net(x_BS[:, :-1])
    functional.cross_entropy(logits_BSV.flatten(0, 1), x_BS[:, 1:].flatten()).backward()
    assert all(float(router.weight_ED.grad.abs().max()) > 1e-8 for router in net.routers)
    total = routed_L[0].weights.sum(-1)
    assert (total < 0.999).all() if top_k == 1 else torch.allclose(total, torch.ones(()))


def test_later_tokens_change_nothing_earlier():
    net, x_BS = make(), tokens(3, 12)
    changed_BS = x_BS.clone()
    changed_BS[:, 7:] = (changed_BS[:, 7:] + 1) % 50
    with torch.no_grad():
        before, after = net(x_BS)[0], net(changed_BS)[0]
    assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_the_cache_gives_the_logits_of_the_whole_sequence():
    net, x_BS = make(), tokens(3, 12)
    cache = KVCache(net.shape, 3)
    with torch.no_grad():
        whole, _ = net(x_BS)
        parts = [net(x_BS[:, :5], cache)[0]]
        parts += [net(x_BS[:, i : i + 1], cache)[0] for i in range(5, 12)]
    assert_close(torch.cat(parts, 1), whole)


def test_the_generator_alone_decides_the_weights():
    state = torch.get_rng_state()
    a, b, c = make(), make(), make(seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.embedding, b.embedding) and not torch.equal(a.embedding, c.embedding)
