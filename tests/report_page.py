"""What tests do on the page of stage=report: go somewhere, filter, and read what the table shows."""

from __future__ import annotations

from typing import Any

from browser import Browser


def go(at: Browser, address: str, ready: str) -> None:
    at.ask(f"void (location.hash = {address!r})")
    at.wait(ready)


def figures(at: Browser) -> None:
    go(at, "#figures", "document.getElementById('charts').dataset.drawn")


def column(at: Browser, name: str) -> list[str]:
    """What the table shows in a column."""
    found: list[str] = at.ask(
        "(() => { const heads = [...document.querySelectorAll('#table-box thead button')];"
        f"const at = heads.findIndex((one) => one.firstChild.textContent === {name!r});"
        "return [...document.querySelectorAll('#table-box tbody tr')].map((row) => row.children[at].innerText); })()"
    )
    return found


def narrow(at: Browser, words: str) -> int:
    """Types a filter and tells how many rows are left."""
    at.ask(
        f"(() => {{ const box = document.getElementById('filter'); box.value = {words!r};"
        "box.dispatchEvent(new Event('input')); return new Promise((done) => setTimeout(done, 150)); })()"
    )
    return int(at.ask("document.querySelectorAll('#table-box tbody tr').length"))


def heading(name: str) -> str:
    return f"""document.querySelector('button[data-sort="{name}"]')"""


def nodes(at: Browser) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = at.call("Accessibility.getFullAXTree")["nodes"]
    return [node for node in told if not node["ignored"]]
