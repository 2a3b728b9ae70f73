"""Offline runs of Weights & Biases in tests: read once they have ended."""

from __future__ import annotations

import time
from pathlib import Path

from prefetch.runs.tracked import OfflineRun, find_offline_runs, read_offline_run


def settled(folder: Path) -> OfflineRun:
    """The one offline run below a folder; the client's service is a process of its own and may write its end later."""
    for _ in range(400):
        (path,) = find_offline_runs(folder)
        run = read_offline_run(path)
        if run.exit_code is not None:
            return run
        time.sleep(0.05)
    raise AssertionError(f"{path}: no exit record after 20 s")
