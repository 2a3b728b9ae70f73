"""The house style: same bytes for same panels, text that stays text, nothing over the data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from prefetch import figures
from prefetch.figures import Axis, Bars, Colours, HeatMap, Key, Line, Lines, Mark, draw, graded

ROOT = Path(__file__).resolve().parents[2]
X, Y = Axis("position (tokens)", whole=True), Axis("share (%)")
SIGNED = Colours("log2 lift", -3, 3, "signed")


def lines_panel(**line: object) -> Lines:
    return Lines("One", X, Y, [Line(np.arange(30), np.arange(30.0) ** 2, "squares", **line)])  # type: ignore[arg-type]


def heat_map(title: str = "Map", colours: Colours = SIGNED) -> HeatMap:
    values = np.random.default_rng(0).normal(size=(9, 7))
    return HeatMap(title, X, Y, values=values, colours=colours, cuts=(2.5,))


def bars() -> Bars:
    kinds = [Key("many", figures.BLUE, shape="bar"), Key("few", figures.SKY, shape="bar")]
    kind_E = ["many", "few", "many"]
    marks = [Mark(2.0, "uniform")]
    heights_E = np.array([3.0, 1.0, 4.0])
    return Bars("Bars", X, Y, (), marks, heights_E=heights_E, kind_E=kind_E, kinds=kinds)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures themselves instead of files."""
    found: list[Figure] = []
    monkeypatch.setattr(figures, "write", lambda figure, stem: found.append(figure) or [stem])
    return found


def test_same_panels_give_the_same_bytes_whatever_the_users_settings(tmp_path: Path) -> None:
    panels = [lines_panel(low=np.zeros(30), high=np.full(30, 900.0)), heat_map(), bars()]
    once = draw(tmp_path / "once", "Title", panels, note="real, 10 tokens")
    with matplotlib.rc_context({"font.size": 31, "svg.hashsalt": "other", "axes.facecolor": "red"}):
        again = draw(tmp_path / "again", "Title", panels, note="real, 10 tokens")
    assert [path.name for path in once] == ["once.svg", "once.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


NINE_PANELS = """
import hashlib, sys
from pathlib import Path
import numpy as np
from prefetch.figures import Axis, Line, Lines, draw
lines = [Line([0, 1, 2], [1.0, 10.0 ** n, 3.0], f"line {n}") for n in range(9)]
files = draw(Path(sys.argv[1]), "Nine", [Lines(line.label, Axis("x"), Axis("y"), [line]) for line in lines])
print([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
"""


def test_another_process_draws_the_same_bytes(tmp_path: Path) -> None:
    """The layout is solved in an order that differs from process to process."""
    printed = {
        subprocess.run(
            [sys.executable, "-c", NINE_PANELS, tmp_path / seed],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and printed != {b""}


def test_svg_keeps_text_as_text_and_tells_no_date(tmp_path: Path) -> None:
    svg, png = draw(tmp_path / "a", "A title", [lines_panel()], note="a note")
    text = svg.read_text()
    words = {"".join(element.itertext()) for element in ElementTree.fromstring(text).iter()}
    assert {"A title", "a note", "squares", "position (tokens)"} <= words
    assert not re.search(r"<dc:date>|Matplotlib v", text)
    assert png.read_bytes().startswith(b"\x89PNG") and b"Software" not in png.read_bytes()


@pytest.mark.parametrize(
    "name", ["$x_1$ & <b>", "$unclosed", "_hidden", "模型 \U0001f600", "a\nb\x07"]
)
def test_names_of_users_are_never_parsed(tmp_path: Path, name: str) -> None:
    panel = Lines(name, Axis(name), Axis(name), [Line([0, 1, 2], [0, 1, 2], name)], [Mark(1, name)])
    domains = HeatMap(name, Axis("x", (name,) * 3), Axis(name), values=np.eye(3), colours=SIGNED)
    svg, _ = draw(tmp_path / "a", name, [panel, domains], note=name)
    words = ["".join(element.itertext()) for element in ElementTree.parse(svg).iter()]
    assert words.count(figures.plain(name)) >= 8  # titles, labels, ticks, legend, note


def test_plain_is_one_line_of_known_characters() -> None:
    assert figures.plain("a\n b") == "a b"
    assert figures.plain("é λ 模\x07") == "é λ □□"


def test_long_names_that_begin_alike_stay_different(tmp_path: Path, drawn: list[Figure]) -> None:
    names = tuple(f"a_very_long_prefix_of_a_domain_{name}" for name in ("law", "code"))
    panel = HeatMap("", Axis("x"), Axis("", names), values=np.eye(2), colours=Colours("c", 0, 1))
    draw(tmp_path / "f", "title", [panel])
    said = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert len(set(said)) == 2 and said[0].endswith("_law") and "…" in said[0]


def test_nothing_to_draw_is_no_file(tmp_path: Path) -> None:
    assert draw(tmp_path / "a", "Title", []) == []
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 3000), st.integers(0, 100))
def test_labels_are_thinned_evenly(n_names: int, first: int) -> None:
    names = [str(first + i) for i in range(n_names)]
    places = figures.thinned(names)
    assert 1 <= len(places) <= figures.MOST_LABELS
    assert len(set(np.diff(places))) <= 1
    step = int(np.diff(places)[0]) if len(places) > 1 else 1
    assert all(int(names[place]) % step == 0 for place in places)


def test_a_shared_legend_stands_under_all_panels(tmp_path: Path, drawn: list[Figure]) -> None:
    draw(tmp_path / "a", "Title", [lines_panel(), lines_panel()])
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["squares"]
    assert all(axes.get_legend() is None for axes in drawn[0].axes)
    assert legend.get_window_extent().y1 < min(axes.bbox.y0 for axes in drawn[0].axes)


def test_where_a_look_means_two_things_each_panel_explains_its_own(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    other = Lines(
        "Two", X, Y, [Line([0, 1], [0, 1], "diagonal"), Line([0, 1], [1, 0], "long " * 9)]
    )
    draw(tmp_path / "a", "Title", [lines_panel(), other])
    assert not drawn[0].legends
    for axes, words in zip(
        drawn[0].axes, (["squares"], ["diagonal", "long " * 8 + "long"]), strict=True
    ):
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == words
        assert legend.get_window_extent().y1 < axes.bbox.y0


def test_one_colour_bar_for_maps_that_lie_together(tmp_path: Path, drawn: list[Figure]) -> None:
    draw(tmp_path / "a", "Title", [heat_map() for _ in range(5)])
    assert len(drawn[0].axes) == 5 + 1
    recall = Colours("recall", 0, 1)
    apart = [
        heat_map(),
        lines_panel(),
        heat_map(),
        heat_map(colours=recall),
        heat_map(colours=recall),
    ]
    draw(tmp_path / "a", "Title", apart)
    assert len(drawn[1].axes) == 5 + 2 + 1


def test_long_titles_and_notes_are_wrapped_into_the_figure(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    draw(tmp_path / "a", "many words " * 40, [lines_panel()], note="Model-X_v2.5:" * 60)
    for text in drawn[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= drawn[0].bbox.width
        assert box.y0 >= 0 and box.y1 <= drawn[0].bbox.height


def test_many_lines_are_graded_and_have_no_legend(tmp_path: Path, drawn: list[Figure]) -> None:
    layers = Colours("layer", 0, 47, "ordered", names=tuple(map(str, range(48))))
    lines = graded(np.arange(5), np.arange(48)[:, None] + np.arange(5), layers)
    draw(tmp_path / "a", "Title", [Lines("Family", X, Y, lines, colours=layers)])
    assert len({line.colour for line in lines}) == 48
    family, bar = drawn[0].axes
    assert not drawn[0].legends and family.get_legend() is None
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert labels == [str(n) for n in range(0, 48, 5)]


def test_a_map_keeps_its_cells_and_shows_where_there_are_none(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    values = np.array([[0.0, np.nan], [3.0, -3.0]])
    draw(tmp_path / "a", "Title", [HeatMap("Map", X, Y, values=values, colours=SIGNED)])
    (image,) = drawn[0].axes[0].images
    shown = image.get_array()
    assert shown is not None
    np.testing.assert_array_equal(np.ma.filled(shown, np.nan), values)
    assert matplotlib.colors.to_hex(image.cmap(np.ma.masked)) == figures.NO_DATA.lower()


def test_only_this_file_knows_matplotlib_and_no_global_state_of_it() -> None:
    source = [*(ROOT / "prefetch").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]
    knows = [
        path.name
        for path in source
        if re.search(r"^\s*(import|from) matplotlib", path.read_text(), re.M)
    ]
    assert knows == ["figures.py"]
    check = "import sys, prefetch.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
