"""Every Triton twin against its definition and both oracles, in a process whose Triton is interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "twins"
ROOT = Path(__file__).resolve().parents[3]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton is only packaged for Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they run natively, here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run here"),
]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_twins_equal_their_definitions_under_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(FOLDER / name)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr
