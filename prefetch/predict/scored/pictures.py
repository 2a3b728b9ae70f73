"""The figures of `train`: from the tables of results to files. It counts nothing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from prefetch.figures import (
    BLACK,
    CATEGORIES,
    GREY,
    VERMILLION,
    Axis,
    Dash,
    Key,
    Line,
    Lines,
    Mark,
    draw,
)

RECALL = Axis("recall (share of choices)", low=0, high=1.02)
WIDE = (4.6, 2.9)
OTHERS = tuple(colour for colour in CATEGORIES if colour not in (VERMILLION, BLACK))
MOST_LINES = 8
ENOUGH_GUESSES = 100  # of a point of the reliability curve
DASHES: tuple[Dash, ...] = ("-", "--", ":")


def draw_all(tables: dict[str, pd.DataFrame], folder: Path, note: str, *, top_k: int) -> list[Path]:
    table = tables["predictors"]
    names = _shown(table)
    looks = _looks(names)
    if hidden := table.predictor.nunique() - len(names):
        note = f"{note}. {hidden} more predictors are in the tables: the least good, and those that cheat"
    return [
        *recall_by_layer(tables["by_layer"], looks, folder, note),
        *recall_by_width(tables["by_width"], looks, folder, note, top_k=top_k),
        *recall_by_horizon(tables["predictors"], looks, folder, note),
        *reliability(tables["reliability"], looks, folder, note),
        *learning_curve(tables["curve"], folder, f"{names[0]}. {note}"),
    ]


def _shown(table: pd.DataFrame) -> list[str]:
    """The chosen one; if there are more than a reader can tell apart, the best of the others that do not cheat."""
    names: list[str] = table.predictor.drop_duplicates().tolist()
    if len(names) <= MOST_LINES:
        return names
    fair = table[(table.rows == "new_text") & (table.mark == "") & (table.predictor != names[0])]
    best = fair.groupby("predictor").recall_at_k.mean().nlargest(MOST_LINES - 1).index
    return [names[0], *(name for name in names if name in best)]


def _looks(names: list[str]) -> dict[str, Key]:
    """The chosen predictor stands out; the others take colours in turn, then dashes."""
    looks = {names[0]: Key(names[0], VERMILLION)}
    for i, name in enumerate(names[1:]):
        looks[name] = Key(name, OTHERS[i % len(OTHERS)], DASHES[i // len(OTHERS) % len(DASHES)])
    return looks


def recall_by_layer(
    table: pd.DataFrame, looks: dict[str, Key], folder: Path, note: str
) -> list[Path]:
    panels = []
    layers = tuple(str(layer) for layer in table.layer.drop_duplicates())
    for horizon, of_horizon in table[table["rows"] == "new_text"].groupby("horizon"):
        lines = [
            Line(range(len(rows)), rows.recall_at_k.to_numpy(), name, key.colour, key.dash)
            for name, key in looks.items()
            if len(rows := of_horizon[of_horizon.predictor == name])
            and rows.recall_at_k.notna().any()
        ]
        x = Axis("layer", layers, low=-0.5, high=len(layers) - 0.5)
        start = Mark(int(str(horizon)) - 0.5, "this token's routing is known from here", ":", True)
        title = f"{horizon} {'layer' if horizon == 1 else 'layers'} ahead"
        panels.append(Lines(title, x, RECALL, lines, (start,)))
    title = "Recall of the k best guesses, layer by layer"
    said = f"New text. Left of the dotted line a guess is made as the token begins. {note}"
    return draw(folder / "recall_by_layer", title, panels, columns=2, note=said, panel_size=WIDE)


def recall_by_width(
    table: pd.DataFrame, looks: dict[str, Key], folder: Path, note: str, *, top_k: int
) -> list[Path]:
    panels = []
    for horizon, of_horizon in table.groupby("horizon"):
        lines = [
            Line(rows.width.to_numpy(), rows.recall.to_numpy(), name, key.colour, key.dash)
            for name, key in looks.items()
            if len(rows := of_horizon[of_horizon.predictor == name])
        ]
        title = f"{horizon} {'layer' if horizon == 1 else 'layers'} ahead"
        mark = Mark(top_k, f"k = {top_k}", ":", True)
        panels.append(
            Lines(title, Axis("width (experts guessed)", whole=True), RECALL, lines, (mark,))
        )
    title = "What more guesses bring"
    said = f"Without rows of a shared template. {note}"
    return draw(folder / "recall_by_width", title, panels, columns=2, note=said, panel_size=WIDE)


def recall_by_horizon(
    table: pd.DataFrame, looks: dict[str, Key], folder: Path, note: str
) -> list[Path]:
    shown = table[table.rows == "new_text"]
    if shown.horizon.nunique() < 2:
        return []
    panels = []
    for column, low, high, title in (
        ("recall_at_k", "low", "high", "k guesses"),
        ("recall_at_2k", "low_2k", "high_2k", "2k guesses"),
    ):
        lines = []
        for name, key in looks.items():
            rows = shown[shown.predictor == name].sort_values("horizon")
            x, y = rows.horizon.to_numpy(), rows[column].to_numpy()
            told = bool(rows[low].notna().all())
            below, above = (rows[low].to_numpy(), rows[high].to_numpy()) if told else (None, None)
            lines.append(Line(x, y, name, key.colour, key.dash, below, above, dots=True))
        panels.append(Lines(title, Axis("horizon (layers ahead)", whole=True), RECALL, lines))
    title = "How recall falls with the distance"
    said = f"Bands: 95 % over requests. New text. {note}"
    return draw(folder / "recall_by_horizon", title, panels, columns=2, note=said, panel_size=WIDE)


def reliability(table: pd.DataFrame, looks: dict[str, Key], folder: Path, note: str) -> list[Path]:
    if table.empty:
        return []
    panels = []
    for horizon, of_horizon in table.groupby("horizon"):
        lines = [Line([0, 1], [0, 1], "as often as said", GREY, ":", dots=False)]
        for name, key in looks.items():
            rows = of_horizon[
                (of_horizon.predictor == name) & (of_horizon.guesses >= ENOUGH_GUESSES)
            ]
            if len(rows):
                x, y = rows.mean_score.to_numpy(), rows.share_right.to_numpy()
                lines.append(Line(x, y, name, key.colour, key.dash, dots=True))
        x_axis = Axis("score of a guess (probability)", low=0, high=1.02)
        title = f"{horizon} {'layer' if horizon == 1 else 'layers'} ahead"
        panels.append(Lines(title, x_axis, Axis("share that was right", low=0, high=1.02), lines))
    title = "Do scores say how often a guess is right?"
    said = f"Points of {ENOUGH_GUESSES} guesses and more. {note}"
    return draw(folder / "reliability", title, panels, columns=2, note=said, panel_size=WIDE)


def learning_curve(table: pd.DataFrame, folder: Path, note: str) -> list[Path]:
    """Loss and validation recall of every epoch, a line per horizon, from the lowest fold to the highest.

    Who learnt from the validation rows as well has no recall there.
    """
    if table.empty:
        return []
    panels = []
    for column, title, y in (
        ("loss", "Loss on the training rows", Axis("training loss (nats, of its own kind)")),
        ("score", "Recall on the validation rows", RECALL),
    ):
        if column not in table:
            continue
        lines = []
        for (horizon, rows), colour in zip(table.groupby("horizon"), CATEGORIES, strict=False):
            epochs = rows.groupby("epoch")[column]
            below, above = epochs.min().to_numpy(), epochs.max().to_numpy()
            mean, label = epochs.mean(), f"{horizon:g} ahead"
            lines.append(
                Line(mean.index.to_numpy(), mean.to_numpy(), label, colour, low=below, high=above)
            )
        panels.append(Lines(title, Axis("epoch", whole=True), y, lines))
    title = "How the network learnt"
    said = f"Lines: mean over folds; bands: from the lowest to the highest. {note}"
    return draw(folder / "learning_curve", title, panels, columns=2, note=said, panel_size=WIDE)
