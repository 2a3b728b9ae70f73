"""The file of a measured machine, with the error of what was simulated on it: from then on it is calibrated.

It measures nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefetch.artifacts import Recipe, Store
from prefetch.engine.profiling.machine import latest
from prefetch.sim.hardware import HARDWARE_FILE, KIND

log = logging.getLogger(__name__)
RECIPE = 1  # raise it when the same numbers are written differently


def seal_error(store: Store, error: float, of: str) -> Path | None:
    """Beside the latest measurement of the store, which it is about; `hardware=measured` takes it from then on."""
    measured = latest(store)
    if measured is None:
        return None
    fields: dict[str, Any] = json.loads((measured / HARDWARE_FILE).read_text())
    fields["measured_error"] = error
    fields["sources"] = {**fields["sources"], "measured_error": of}

    def build(folder: Path, _: Mapping[str, Path]) -> None:
        (folder / HARDWARE_FILE).write_text(json.dumps(fields, indent=1) + "\n")
        for name in ("machine.json", "copies.csv"):
            (folder / name).write_bytes((measured / name).read_bytes())

    recipe = Recipe(kind=KIND, version=RECIPE, config={"calibrated": fields}, build=build)
    sealed = store.make(recipe)
    log.info(
        "hardware=measured now carries an error of %.1f %% (%s/%s)", 100 * error, KIND, sealed.key
    )
    return sealed.folder
