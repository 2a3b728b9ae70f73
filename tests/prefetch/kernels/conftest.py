"""Triton's twins run on a GPU or, in a process that began with TRITON_INTERPRET=1, in Python; else they are left out.

What Triton itself is written in is interpreted or not from the moment it is imported, and other tests import it: so
`test_twins.py` starts the process that has the variable.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

NATIVE = torch.cuda.is_available() and sys.platform == "linux"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if NATIVE or INTERPRETED else ["twins"]


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"
