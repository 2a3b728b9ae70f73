"""What a trace says of where it comes from is of the kinds that are promised, whoever wrote it."""

import pytest

from prefetch.errors import FormatError
from prefetch.trace.provenance import Provenance

SOUND = {"kind": "real", "source": "x", "versions": {"tool": "1"}, "seed": None, "notes": ["a"]}


def test_a_sound_one_comes_back_equal():
    told = Provenance.from_json(SOUND, "trace.json")
    assert Provenance.from_json(told.to_json(), "trace.json") == told


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ({"source": 5}, "source and notes"),
        ({"notes": [5]}, "source and notes"),
        ({"versions": 5}, "versions must be an object"),
        ({"versions": {"tool": ["1"]}}, "versions holds"),
        ({"facts": []}, "facts must be an object"),
        ({"inputs": {"a": None}}, "inputs holds"),
        ({"seed": "0"}, "seed must be"),
        ({"kind": "drawn"}, "kind must be"),
    ],
)
def test_other_kinds_of_values_are_refused(odd, named):
    with pytest.raises(FormatError, match=named):
        Provenance.from_json({**SOUND, **odd}, "trace.json")
