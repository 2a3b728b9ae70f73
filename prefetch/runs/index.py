"""The store's index of runs, wherever they wrote: what a run stood on is kept while the run has its folder."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from prefetch.artifacts import Store
from prefetch.written import write_whole

log = logging.getLogger(__name__)
RUNS = "runs"


def write_index(
    store: Store, *, stage: str, folder: Path, failed: bool, is_over: bool = True
) -> None:
    """Enters a run into the store's index: its folder, its stage, and what it stood on, or stands on while it runs."""
    where, index = str(folder.resolve()), store.root / RUNS
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    entry = {
        "stage": stage,
        "folder": where,
        "failed": failed,
        "used": sorted(store.used),
    }
    try:
        index.mkdir(parents=True, exist_ok=True)
        text = json.dumps(entry, indent=1) + "\n"
        write_whole(index / f"{name}.json", text, lasting=is_over)
    except OSError as error:
        if is_over:  # said once
            log.warning("%s: the run could not be entered (%s)", index, error)
