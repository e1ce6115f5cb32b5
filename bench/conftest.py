"""For `pytest bench/ --benchmark-only`: what the benchmark files share. `make test` does not come here."""

from __future__ import annotations

import pytest
import torch

from gemma4_fast.model import parse_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one."""
    return parse_device(None)
