"""The house's arrows: which room may import which when it is loaded. A method may reach up later, inside its body."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gemma4_fast

PACKAGE = Path(gemma4_fast.__file__).parent
# Each room, and what it may import of this package at its top level.
LOW = {"errors", "files", "tables", "config", "native", "spelling"}
ALLOWED: dict[str, set[str]] = {
    "cuda_build": set(),
    "files": {"errors"},
    "native": {"cuda_build", "files"},
    "quant": {"native"},
    "reference": {"reference", "config", "quant"},
    "ops": {"ops", "reference", "errors", "native", "quant", "spelling"},
    "cache": {"config", "native"},
    "layers": {"ops", "cache", "config", "quant"},
    "spelling": set(),
    "keywords": {"spelling"},
    "model": {"ops", "cache", "config", "keywords", "layers", "native", "quant"},
    "memory": {"cache", "config", "errors", "layers", "model", "quant"},
    "graph": {"ops", "cache", "layers", "sampling"},
    "explain": {"ops", "layers", "tables"},
    "sampling": set(),
    "tokenizer": LOW | {"weights"},
    "weights": LOW | {"sampling"},
    "generate": {"cache", "errors", "graph", "keywords", "sampling"},
    "report": LOW,
    "edges": {"ops", "cache", "config", "reference"},
    "bench": LOW
    | {"bench", "reference", "ops", "cache", "layers", "memory", "model", "terminal", "explain"}
    | {"weights", "quant"},
    "verify": {"ops", "cache", "config", "graph", "layers", "edges", "report", "reference"} | {"native", "quant", "sampling"},
    "verdicts": {"files", "native", "ops", "layers"},
    "integrations": {
        "integrations",
        "ops",
        "errors",
        "cache",
        "config",
        "edges",
        "generate",
        "graph",
        "layers",
        "model",
        "native",
        "quant",
        "reference",
        "report",
        "verify",
    },
}


def imported(file: Path) -> set[str]:
    """Rooms of this package that the file imports at its top level, type-checking blocks left out."""
    rooms: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gemma4_fast":
            parts = node.module.split(".")[1:]
            rooms |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gemma4_fast.")}
    return rooms


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    files = sorted((PACKAGE / room).glob("*.py")) or [PACKAGE / f"{room}.py"]
    for file in files:
        assert imported(file) <= ALLOWED[room], file.name
