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
from prefetch.engine.profiling import whose
from prefetch.sim.hardware import HARDWARE_FILE, KIND

log = logging.getLogger(__name__)
RECIPE = 1  # raise it when the same numbers are written differently


def seal_error(store: Store, error: float, of: str, here: Mapping[str, Any]) -> Path | None:
    """Beside the measurement that the run stood on; `hardware=measured` takes it from then on.

    here: the device that was validated. An error of one device is never written into the file of another.
    """
    measured = next((store.root / key for key in store.used if key.startswith(f"{KIND}/")), None)
    if measured is None:
        return None
    if not whose.is_of(measured, here):
        why = (
            "; ".join(whose.differences(whose.about(measured), here))
            or "it does not say whose it is"
        )
        log.warning(
            "the error is not written into %s, which is of another device than the one that was validated: %s. To "
            "measure this one: %s profile.device=%s",
            measured.name,
            why,
            whose.ANEW,
            "cuda" if here.get("device_kind") == "gpu" else "cpu",
        )
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
