"""The entry as a user types it: a process of its own, with its exit code and its lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("source=synthetic", "source.n_requests=3", "tracker=none")


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "run.py"), *words]


def environment() -> dict[str, str]:
    told = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    told.pop("HYDRA_FULL_ERROR", None)
    return told


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def begin(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Left running, to be stopped; nohup's children ignore Ctrl-C, and this one must not."""

    def hears_everything() -> None:
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.SIG_DFL)

    return subprocess.Popen(
        command(*words), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=hears_everything, start_new_session=True,
    )  # fmt: skip
