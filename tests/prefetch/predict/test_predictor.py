"""What a predictor learnt is what is saved, counted and put back, its members' with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefetch.errors import ConfigError, FormatError
from prefetch.predict.predictor import (
    ABOUT,
    ANSWER,
    FIT,
    NOTHING,
    SCHEMA,
    STATE,
    Declared,
    cheats,
    check_same_shape,
    declared,
    horizons_of,
    parameter_bytes,
    resident_bytes,
    restore,
    save,
    state_of,
)
from prefetch.trace.card import plain_card


class Learns:
    """Two arrays learnt, one of them not contiguous; a setting, a number learnt, and an array that is none of it."""

    horizons, needs, sees, score = (1,), (), NOTHING, "rank"

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.width, self.epochs_, self.given = 3, 7, np.zeros(100)
        self.weights_ = rng.random((4, 6))[:, ::2]
        self.biases_ = rng.random(5).astype(np.float32)

    def fit(self, train: Any, validation: Any) -> Any: ...
    def scores(self, past: Any) -> Any: ...


class Large(Learns):
    def resident_bytes(self) -> int:
        return 1000


class Both(Learns):
    def __init__(self, *members: Learns) -> None:
        super().__init__(9)
        self.made_of = {f"m{n}": member for n, member in enumerate(members)}


def test_the_state_is_the_arrays_that_were_learnt() -> None:
    both = Both(Learns(1), Learns(2))
    state = state_of(both)
    names = ["biases_", "weights_"]
    assert [*state] == [*names, *(f"m{n}.{name}" for n in (0, 1) for name in names)]
    np.testing.assert_array_equal(state["m1.weights_"], Learns(2).weights_)
    assert all(array.flags["C_CONTIGUOUS"] for array in state.values())


def test_bytes_are_of_what_was_learnt_or_of_what_is_said() -> None:
    alone = 4 * 3 * 8 + 5 * 4
    assert parameter_bytes(Learns()) == resident_bytes(Learns()) == alone
    assert resident_bytes(Large()) == 1000
    both = Both(Learns(), Large())
    assert (parameter_bytes(both), resident_bytes(both)) == (3 * alone, 2 * alone + 1000)
    both.declared = Declared(parameter_bytes=17)  # type: ignore[attr-defined]
    assert declared(both) == Declared(parameter_bytes=17) and resident_bytes(both) == 17
    assert declared(Learns()) is None


def test_who_sees_the_answer_cheats() -> None:
    honest, cheat = Learns(), Learns()
    cheat.sees = ANSWER  # type: ignore[misc]
    assert cheats(cheat) and not cheats(honest)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    learnt, fresh = Both(Learns(1)), Both(Learns(2))
    save(learnt, tmp_path, {"seed": 5}, 1.5)
    assert json.loads((tmp_path / FIT).read_text()) == {"seconds": 1.5}
    about = restore(fresh, str(tmp_path))
    assert about == {"schema": SCHEMA, "class": f"{__name__}.Both", "seed": 5}
    for name, array in state_of(learnt).items():
        np.testing.assert_array_equal(state_of(fresh)[name], array)
    assert "m0.weights_" not in vars(fresh)
    with pytest.raises(FormatError, match=r"learnt by .*Both, and cannot be put into .*Learns"):
        restore(Learns(), tmp_path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    save(Learns(1), tmp_path, {}, 0.0)
    for name in ("width", "__class__", "__dict_", "m0.", "_"):
        save_file({name: np.zeros(1)}, str(tmp_path / STATE))
        with pytest.raises(FormatError, match="is no array that a predictor learns"):
            restore(Learns(), tmp_path)
    (tmp_path / ABOUT).write_text(json.dumps({"schema": "prefetch.predictor/0"}))
    with pytest.raises(FormatError, match=r"expected schema prefetch\.predictor/1"):
        restore(Learns(), tmp_path)


def test_one_that_does_not_say_who_learnt_it_is_put_back(tmp_path: Path) -> None:
    save(Learns(1), tmp_path, {}, 0.0)
    assert sorted(load_file(tmp_path / STATE)) == ["biases_", "weights_"]
    (tmp_path / ABOUT).write_text(json.dumps({"schema": SCHEMA}))
    fresh = Learns(2)
    restore(fresh, tmp_path)
    np.testing.assert_array_equal(fresh.biases_, Learns(1).biases_)


def test_horizons_are_different_whole_numbers_from_one_on() -> None:
    assert horizons_of([3, 1]) == (3, 1) and horizons_of(np.array([2])) == (2,)
    for wrong in ([], [0], [2, 0], [2, 2]):
        with pytest.raises(ConfigError, match="different whole numbers from 1 on"):
            horizons_of(wrong)


def test_a_model_of_another_shape_is_refused() -> None:
    def card(layers: int = 2, experts: int = 8, top_k: int = 2) -> Any:
        return plain_card(
            "m", n_experts=experts, top_k=top_k, layer_numbers=tuple(range(5, 5 + layers))
        )

    check_same_shape(card(), card())
    for other, said in (
        (card(3), "n_layers=3"), (card(experts=9), "n_experts=9"), (card(top_k=1), "top_k=1"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=said):
            check_same_shape(card(), other)
