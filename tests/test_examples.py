"""Each script in examples/ runs, with the tiny model, and prints what it is meant to show."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

from gemma4_fast import ops

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHOWS = {
    "generate_text": (
        r"It is a truth .+\n(.*\n)*24 tokens, stopped by: length\n"
        r"The sun .+\nMy dear Mr. Bennet, .+"
    ),
    "stream_and_chat": r"\w.+\n> What is your name\?\n.*\w.*\n> Where do you live\?\n.*\w",
    "accelerate_transformers": r"It is a truth universally.+\n(.*\n)*passed: \d+ comparisons",
    "quantize_weights": r"bf16: 9\.8 MB.+\nint8: 5\.2 MB.+\nint4: 3\.2 MB.+",
    "add_an_op": r"softcap runs on torch(.*\n)+(\w+ in torch\.\w+: right\n){4}",
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_example(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "accelerate_transformers" and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setattr(ops.table, "TABLE", dict(ops.TABLE))  # stays as it is
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(SHOWS[name], printed), printed
