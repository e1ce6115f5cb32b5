"""Run by `make sanitize` before the tests of the CPU kernels, in the same process: their library is the sanitized one."""

from __future__ import annotations

from pathlib import Path

from gemma4_fast import native


def test_the_kernels_that_run_are_the_sanitized_ones() -> None:
    assert native.kernels_missing() is None
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/_cpu." in line}
    print(*loaded)
    assert len(loaded) == 1
    symbols = Path(*loaded).read_bytes()
    assert b"__asan_init" in symbols and b"__ubsan_handle" in symbols
