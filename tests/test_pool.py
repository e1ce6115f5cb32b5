"""The CPU kernels' pool of threads: tests/sanitize/pool.cpp, and what Python programs do with it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from gemma4_fast import Gemma4, native

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++")
PROMPT = "It is a truth universally acknowledged " * 8


@pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(COMPILER) is None,
    reason="needs a C++ compiler, on Linux",
)
def test_the_pool(tmp_path: Path) -> None:
    program = tmp_path / "pool"
    sources = [ROOT / "tests/sanitize/pool.cpp", ROOT / "csrc/cpu/pool.cpp"]
    flags = ["-std=c++17", "-O1", "-pthread", "-DGEMMA4_ISA=plain", f"-I{ROOT}/csrc"]
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(program), "-ldl"], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "pool: 0 failures\n"


@pytest.mark.skipif(native.kernels_missing() is not None, reason="the CPU kernels are not built")
def test_threads_that_generate_at_once_share_the_pool() -> None:
    model = Gemma4.from_pretrained("tiny", check=False)
    alone = model.generate(PROMPT, temperature=0, max_new_tokens=24).token_ids
    results: list[list[int]] = []

    def generate() -> None:
        torch.set_num_threads(2)
        own = Gemma4.from_pretrained("tiny", check=False)
        results.append(own.generate(PROMPT, temperature=0, max_new_tokens=24).token_ids)

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone] * 3


FORKED = """
import os, torch
torch.set_num_threads(2)
from gemma4_fast import Gemma4
model = Gemma4.from_pretrained("tiny", check=False)
prompt = "It is a truth universally acknowledged " * 8
wanted = model.generate(prompt, temperature=0, max_new_tokens=8).token_ids
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # PyTorch's own OpenMP does not survive a fork
    got = model.generate(prompt, temperature=0, max_new_tokens=8).token_ids
    os._exit(0 if got == wanted else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(native.kernels_missing() is not None, reason="the CPU kernels are not built")
def test_a_process_forked_after_generating_generates() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout == "0\n", done.stderr
