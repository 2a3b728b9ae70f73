"""How long a fit took before it was interrupted: a note beside the checkpoints that it goes on from."""

from __future__ import annotations

import json
import time
from pathlib import Path

from prefetch.errors import reading
from prefetch.written import write_whole

NOTE = "elapsed.json"


def seconds_before(folder: Path) -> float:
    """Seconds up to the last checkpoint, of all attempts so far; notes that another one begins.

    What an attempt did after its last checkpoint is done again, and counted then. A killed attempt could not write its
    end, so that it is read from the checkpoints' own times.
    """
    seconds, note = 0.0, folder / NOTE
    if note.exists():
        with reading(note, "how long an interrupted fit took"):
            told = json.loads(note.read_text())
            ends = [path.stat().st_mtime for path in folder.glob("*.ckpt")]
            seconds = told["seconds"] + max(0.0, max(ends, default=0.0) - told["began"])
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps({"seconds": seconds, "began": time.time()}) + "\n")
    return float(seconds)
