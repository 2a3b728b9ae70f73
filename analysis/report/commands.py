"""The exact command that makes a run again, as it can be pasted into a shell."""

from __future__ import annotations

import shlex

from analysis.report.runs import Run


def command(run: Run) -> str | None:
    """None = what was typed is not known."""
    if run.overrides is None:
        return None
    words = list(run.overrides)
    if not any(word.startswith("stage=") for word in words):
        words.insert(0, f"stage={run.stage}")
    return f"python scripts/run.py {shlex.join(words)}"
