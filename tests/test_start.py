"""What is imported when: the package and the command's help do without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import gemma4_fast

HEAVY = ("torch", "transformers", "numpy", "rich", "tokenizers", "jinja2", "huggingface_hub")
IMPORTED = f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
NAMES = """
for _ in range(2):
    assert callable(gemma4_fast.verify) and callable(gemma4_fast.explain)
    from gemma4_fast import explain, verify
    assert callable(verify) and callable(explain)
    import gemma4_fast.verify, gemma4_fast.explain, gemma4_fast.ops
    from gemma4_fast import verify, explain, ops, Gemma4, use_backend
    assert (verify, explain) == (gemma4_fast.verify, gemma4_fast.explain)
    assert verify is sys.modules["gemma4_fast.verify"].verify
    assert explain is sys.modules["gemma4_fast.explain"].explain
    assert ops is sys.modules["gemma4_fast.ops"] and use_backend is ops.use_backend
    assert Gemma4 is sys.modules["gemma4_fast.model"].Gemma4
"""


def python(code: str) -> str:
    argv = [sys.executable, "-c", f"import json, sys\n{code}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_large() -> None:
    assert json.loads(python(f"import gemma4_fast; gemma4_fast.__version__; {IMPORTED}")) == []


@pytest.mark.parametrize(
    "argv",
    ["--version", "--help", "generate --help", "chat --help", "bench --help", "bench model --help"],
)
def test_version_and_help_import_nothing_large(argv: str) -> None:
    code = f"""
from gemma4_fast.cli import main
try:
    main({argv.split()!r})
except SystemExit as e:
    assert e.code == 0
print()
{IMPORTED}
"""
    assert json.loads(python(code).splitlines()[-1]) == []


@pytest.mark.parametrize(
    "first",
    [
        "import gemma4_fast",
        "import gemma4_fast.verify, gemma4_fast.explain",
        "from gemma4_fast.explain import Explanation; from gemma4_fast.verify import Report",
        "from gemma4_fast import verify, explain; import gemma4_fast",
        "from gemma4_fast import *; import gemma4_fast; assert callable(verify)",
    ],
)
def test_functions_are_not_replaced_by_modules_of_the_same_name(first: str) -> None:
    python(f"{first}\nimport gemma4_fast\n{NAMES}")


def test_public_names() -> None:
    assert set(gemma4_fast.__all__) <= set(dir(gemma4_fast))
    for name in gemma4_fast.__all__:
        assert getattr(gemma4_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        gemma4_fast.nonsense  # noqa: B018
    assert not hasattr(gemma4_fast, "__wrapped__")


def test_a_public_name_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> None:
        pass

    monkeypatch.setattr(gemma4_fast, "verify", other)
    assert gemma4_fast.verify is other
