"""What all tests share: the tests' folder on the path (for family.py), one small pool of threads, and, where there is no GPU,
Triton kernels that run in its interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads crawl on a busy machine

import pytest
import torch

import gemma4_fast.triton
import gemma4_fast.verdicts

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    # Asked when a kernel is defined, and when Triton's own functions are. Not left there: to all other tests this is a machine
    # that cannot run them, as test_triton.py's are told that it can.
    os.environ["TRITON_INTERPRET"] = "1"
    for module in pkgutil.iter_modules(gemma4_fast.triton.__path__):
        importlib.import_module(f"gemma4_fast.triton.{module.name}")
    del os.environ["TRITON_INTERPRET"]

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def no_verdict_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each self-check runs: a verdict that another test has left says nothing of a fault that this one plants."""
    monkeypatch.setattr(gemma4_fast.verdicts, "folder", lambda: None)
