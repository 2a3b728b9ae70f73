"""Figures show the rows that the headline is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefetch.figures import VERMILLION, Key
from prefetch.predict.scored import pictures


def test_recall_by_layer_is_of_new_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "draw", lambda *given, **_: drawn.append(given[2]) or [])
    rows = [
        {"predictor": "a", "horizon": 1, "rows": part, "layer": layer, "recall_at_k": recall}
        for part, recall in (("new_text", 0.25), ("all", 0.75))
        for layer in (3, 4)
    ]
    table = pd.DataFrame(rows)
    pictures.recall_by_layer(table, {"a": Key("a", VERMILLION)}, tmp_path, "note")
    ((panel,),) = drawn
    assert panel.lines[0].y.tolist() == [0.25, 0.25]


def test_without_validation_recall_the_loss_is_drawn_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "draw", lambda *given, **_: drawn.append(given[2]) or [])
    rows = [{"fold": 0, "horizon": 1, "epoch": epoch, "loss": 1.0 / epoch} for epoch in (1, 2)]
    pictures.learning_curve(pd.DataFrame(rows), tmp_path, "note")
    ((panel,),) = drawn
    assert panel.lines[0].y.tolist() == [1.0, 0.5]
