"""The page's figures and colours in a real browser: drawn, hovered, switched, filtered, told apart."""

from __future__ import annotations

import pytest
from browser import Browser
from report_page import figures, go, narrow
from report_runs import HOSTILE


def test_figures_are_drawn_and_a_point_says_what_it_is(at: Browser) -> None:
    figures(at)
    assert at.ask("document.querySelectorAll('.chart .plot .main-svg').length") >= 6
    at.ask("document.getElementById('chart-hit-rate').scrollIntoView()")
    x, y = at.ask(
        "(() => { const box = document.querySelector('#chart-hit-rate .points path').getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    at.point_at(x + 40, y + 40)
    at.point_at(x, y)
    at.wait("!!document.querySelector('#chart-hit-rate .hoverlayer .hovertext')")
    told = at.ask(
        "['time-per-token', 'explore'].map((id) => document.querySelector(`#chart-${id} .plot`).data[0].text[0])"
    )
    assert all("(simulated)" in text for text in told[:1]), told
    said = at.ask("document.querySelector('#chart-hit-rate .hoverlayer').textContent")
    assert "hit rate of distinct experts" in said and "%" in said


def test_figures_keep_marks_and_hostile_names_and_follow_the_filter(at: Browser) -> None:
    figures(at)
    keys = (
        "[...document.querySelectorAll('#chart-hit-rate .keys button')].map((one) => one.innerText)"
    )
    names = at.ask(keys)
    assert "belady\ncheats" in names and "lru + markov" in names
    assert f"lru + {HOSTILE[0]}" in names
    assert at.ask("document.querySelectorAll('#charts :is(img, script, b)').length") == 0
    assert "simulated" in at.ask("document.querySelector('#chart-time-per-token h3').innerText")
    go(at, "#runs", "!document.getElementById('section-runs').hidden")
    narrow(at, "predictor=markov")
    figures(at)
    at.wait(f"{keys}.length < {len(names)}")
    assert "lru + markov" in at.ask(keys) and "lru + popularity" not in at.ask(keys)


def test_a_key_takes_its_line_away_and_gives_it_back(at: Browser) -> None:
    figures(at)
    lines = "document.querySelectorAll('#chart-recall-by-layer .scatterlayer .trace').length"
    key = "document.querySelector('#chart-recall-by-layer .keys button')"
    before = at.ask(lines)
    for pressed, count in (("false", before - 1), ("true", before)):
        at.ask(f"{key}.click()")
        at.wait(f"{lines} === {count}")
        assert at.ask(f"getComputedStyle({key}).opacity") == "1", "also what is off can be read"
        assert at.ask(f"{key}.getAttribute('aria-pressed')") == pressed
    at.ask("document.querySelector('#chart-recall-by-layer details').open = true")
    at.wait("document.querySelectorAll('#chart-recall-by-layer details tbody tr').length > 3")


def test_any_two_numbers_meet_and_a_point_opens_its_run(at: Browser) -> None:
    narrow(at, "stage:evaluate predictor=markov simulator.cache<0.35 state=finished")
    figures(at)
    chosen = "['x', 'y', 'colour'].map((name) => document.getElementById(`explore-${name}`).value)"
    assert at.ask(chosen) == ["setting simulator.cache", "metric hit_rate", ""], (
        "nothing else differs"
    )
    points = "document.querySelectorAll('#chart-explore .points path')"
    before = at.ask(f"{points}.length")
    assert before == at.ask("document.querySelectorAll('#table-box tbody tr').length") > 0
    at.ask(
        "(() => { const box = document.getElementById('explore-x'); box.value = 'setting predictor';"
        "box.dispatchEvent(new Event('change')); })()"
    )
    at.wait(
        "[...document.querySelectorAll('#chart-explore .xtick')].some((one) => one.textContent === 'markov')"
    )
    at.ask("document.getElementById('chart-explore').scrollIntoView()")
    x, y = at.ask(
        f"(() => {{ const box = {points}[0].getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    at.point_at(x + 30, y + 30)
    at.point_at(x, y)
    at.wait("!!document.querySelector('#chart-explore .hoverlayer .hovertext')")
    at.click(x, y)
    at.wait("location.hash.startsWith('#run-') && !!document.querySelector('#run dl')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(at: Browser, scheme: str) -> None:
    """Contrast of WCAG 2.2: 4.5 for text, 3 for lines of figures."""
    at.prefer(prefers_color_scheme=scheme)
    at.ask(
        """void (window.contrast = (one, other) => {
          const light = (name) => {
            const probe = document.body.appendChild(document.createElement("i"));
            probe.style.color = `var(--${name})`;
            const parts = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255);
            probe.remove();
            const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
          return (high + 0.05) / (low + 0.05);
        })"""
    )
    text = [("text", "page"), ("text", "tint"), ("text", "raised"), ("quiet", "page"), ("accent", "page"),
            ("bad", "page"), ("wait", "page"), ("text", "bad-tint"), ("accent", "raised")]  # fmt: skip
    lines = [(f"series-{i}", "page") for i in range(7)]
    for pairs, least in ((text, 4.5), (lines, 3.0)):
        for one, other in pairs:
            assert at.ask(f"contrast({one!r}, {other!r})") >= least, (one, other)


def test_the_switch_of_light_and_dark(at: Browser) -> None:
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = at.ask(paper)
    button = "document.getElementById('theme')"
    figures(at)
    ink = "getComputedStyle(document.querySelector('#chart-hit-rate .xtick text')).fill"
    before = at.ask(ink)
    at.ask(f"{button}.click()")
    assert at.ask(f"{button}.textContent") == "Theme: light" and at.ask(paper) == light
    at.ask(f"{button}.click()")
    assert at.ask(f"{button}.textContent") == "Theme: dark" and at.ask(paper) != light
    at.wait(f"{ink} !== {before!r}")
    at.ask(f"{button}.click()")
    at.prefer(prefers_color_scheme="dark")
    assert at.ask(paper) != light, "as the system"
