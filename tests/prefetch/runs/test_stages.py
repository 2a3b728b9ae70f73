"""What the entry makes of an error: a line for whoever typed, a traceback for a slip of ours."""

import numpy as np
import pytest

from prefetch.runs import stages


def test_what_no_machine_can_hold_is_said_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "stage=analyze"])
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert stages.guarded(lambda: np.empty(2**55)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert (
        said.startswith("error: out of memory (") and "256. PiB" in said and "ask for less" in said
    )


def test_a_slip_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "stage=analyze"])
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        stages.guarded(lambda: 1 // 0)
