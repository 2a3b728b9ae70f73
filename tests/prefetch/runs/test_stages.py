"""What the entry makes of an error: a line for whoever typed, a traceback for a slip of ours."""

import os
import time
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from prefetch import config, stock
from prefetch.artifacts import Recipe, Store, lock_path
from prefetch.manifest import MANIFEST
from prefetch.runs import stages


@pytest.mark.parametrize(
    ("ask", "told"),
    [(lambda: np.empty(2**55), "256. PiB"), (lambda: torch.empty(2**55), "144115188075855872")],
)
def test_what_no_machine_can_hold_is_said_in_a_line(monkeypatch, capsys, ask, told):
    monkeypatch.setattr("sys.argv", ["run.py", "stage=analyze"])
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert stages.guarded(ask) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert said.startswith("error: out of memory (") and told in said and "ask for less" in said


def test_a_slip_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "stage=analyze"])
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        stages.guarded(lambda: 1 // 0)


def test_what_a_run_at_work_stands_on_is_not_removed_as_unused(tmp_path, monkeypatch):
    """However long ago it asked for it: it is in the index from then on, not from its end."""
    words = ["stage=collect", f"store={tmp_path}/store", "artifacts.remove=unused"]
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg: Any = compose("config", overrides=words)

    def at_work(cfg: Any, store: Store, *_: Any) -> dict[str, float]:
        recipe = Recipe("trace", 1, {}, lambda folder, _: (folder / "a").touch())
        made = store.make(recipe).folder
        for path in (lock_path(made), made / MANIFEST):
            os.utime(path, (time.time() - 7200, time.time() - 7200))
        stock.run(cfg, Store(cfg.store))
        return {"is_there": float(made.exists())}

    monkeypatch.setattr(stages, "_recorded", at_work)
    monkeypatch.setattr(stages.sweeps, "is_sweep", lambda: False)
    monkeypatch.setattr(stages.sweeps, "words", lambda _: [])
    assert stages.record(cfg, tmp_path / "out") == {"is_there": 1.0}
