"""Guesses of somebody else's: what an npz may not be is refused in words, before anything is made of it."""

import zipfile

import numpy as np
import pytest
from routing_traces import random_trace

from prefetch.errors import ConfigError, FormatError
from prefetch.predict.imported import Imported
from prefetch.predict.part import whole

TRACE = random_trace(n_requests=3, tokens=8)
SHAPE = (TRACE.n_tokens, TRACE.card.n_layers, 2)
IDS = np.tile(np.arange(2), (*SHAPE[:2], 1))


def asked(path, **arrays):
    np.savez(path, **arrays)
    part = whole(TRACE)
    predictor = Imported(path=str(path)).fit(part, part)
    return [predictor.scores(lesson.past) for lesson in part.lessons(1)]


def test_ids_alone_are_guesses_in_their_order(tmp_path):
    (scores_TLE,) = asked(tmp_path / "a.npz", ids=IDS)
    assert (scores_TLE.argmax(axis=2) == 0).all()


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"ids": IDS.astype(float)},
        {"ids": IDS[0]},
        {"ids": IDS[:-1]},
        {"ids": np.stack([IDS, IDS], 1)},
        {"ids": IDS, "horizons": np.array(1)},
        {"ids": IDS, "horizons": np.array(["x"])},
        {"ids": IDS, "horizons": np.array([1, 4])},
        {"ids": IDS, "request": TRACE.request_T},
        {"ids": IDS, "request": TRACE.request_T[:-1], "position": TRACE.position_T},
        {"ids": IDS, "request": TRACE.request_T.astype("U"), "position": TRACE.position_T},
        {"ids": IDS, "request": TRACE.request_T[:, None], "position": TRACE.position_T[:, None]},
        {"ids": IDS, "scores": np.zeros(SHAPE[:2])},
        {"ids": IDS, "scores": np.full(SHAPE, np.nan)},
        {"ids": np.full(SHAPE, 99)},
        {"ids": np.zeros(SHAPE, int)},
    ],
)
def test_what_is_not_as_it_must_be_is_refused_with_its_file(tmp_path, arrays):
    with pytest.raises((FormatError, ConfigError), match=r"a\.npz"):
        asked(tmp_path / "a.npz", **arrays)


def test_an_npz_is_never_a_bomb_and_never_runs_anything(tmp_path):
    path, part = tmp_path / "a.npz", whole(TRACE)
    np.savez(path, ids=np.array([[[1, "x"]]], object))
    with pytest.raises(FormatError, match="Python objects"):
        Imported(path=str(path)).fit(part, part)
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 25}, 2, 2), }}\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        lead = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        archive.writestr("ids.npy", lead + bytes(1 << 27))
    with pytest.raises(FormatError, match="zip bomb"):
        Imported(path=str(path)).fit(part, part)
