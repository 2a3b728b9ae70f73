"""One call from a notebook: the same hits as by hand, and clear words about what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from prefetch import simulate
from prefetch.errors import ConfigError, FormatError
from prefetch.sim.policies.lru import Lru

IDS = np.array([[[0, 1]], [[0, 2]], [[3, 0]], [[1, 2]]])  # four tokens, one layer


def test_hits_by_hand():
    """Two of four experts: 0 and 1 come, 0 stays for 2, then 3 and 0 meet 0, then nobody."""
    told = simulate(IDS, 2, n_experts=4)
    assert told.is_hit_A.tolist() == [False, False, True, False, False, True, False, False]
    assert (told.accesses, told.loads, told.hit_rate) == (8, 6, 0.25)


def test_a_share_an_object_and_two_lanes():
    assert simulate(IDS, 0.5, Lru(), n_experts=4).loads == 6
    both = simulate(IDS, 1.0, "belady", n_experts=4, request_T=[0, 0, 1, 1], batch=2)
    assert both.loads == 4 and both.accesses == 3 + 3  # {0 1 3} and {0 2 1}
    assert (
        simulate(IDS, 2, "random", n_experts=4, scope="global", semantics="sequential").loads >= 4
    )


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"cache": 5}, ConfigError, "up to 4 experts"),
        ({"cache": 1.5}, ConfigError, "0.0 to 1.0"),
        ({"cache": "500MiB"}, ConfigError, "cache='500MiB': expected a share"),
        ({"cache": 2, "policy": "mru"}, ConfigError, "there are arc"),
        ({"cache": 2, "semantics": "fuzzy"}, ConfigError, "expected one of atomic"),
        ({"cache": 2, "ids_TLK": IDS[0]}, FormatError, "three axes"),
        ({"cache": 2, "n_experts": 3}, FormatError, "out of range for 3 experts"),
    ],
)
def test_a_mistake_is_one_clear_line(settings, kind, said):
    with pytest.raises(kind, match=said):
        simulate(**{"ids_TLK": IDS, "n_experts": 4, **settings})
