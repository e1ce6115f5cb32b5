"""Registers the package's functions with transformers as soon as its modules are loaded, before or after this package.

transformers takes seconds to import, and is optional: `import gemma4_fast` must not import it. So a finder stands before the
others in sys.meta_path. It knows the modules of `REGISTRARS` alone; for those it asks the finders behind it, as Python would,
and has the module registered once it is executed. All others it answers with None, at once.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger("gemma4_fast")

NAME = "gemma4_fast"  # attn_implementation=, experts_implementation=
OLDEST = (5, 17)  # of transformers


def _experts(module: ModuleType) -> None:
    from gemma4_fast.integrations import interfaces

    module.ExpertsInterface.register(NAME, interfaces.experts)


def _masks(module: ModuleType) -> None:
    from gemma4_fast.integrations import interfaces

    module.AttentionMaskInterface.register(NAME, interfaces.attention_mask)


def _attention(module: ModuleType) -> None:
    from gemma4_fast.integrations import interfaces

    module.AttentionInterface.register(NAME, interfaces.attention)


REGISTRARS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.integrations.moe": _experts,
    "transformers.masking_utils": _masks,
    "transformers.modeling_utils": _attention,
}


class _Registering(Loader):
    """Loads as `loader` does, and registers. The module and its spec get `loader` itself back before any of the module's code
    runs, as from importlib.util.LazyLoader: nobody who looks at them later sees this one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet: copy and pickle ask before they fill it in
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register(module)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in REGISTRARS:
            return None
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Registering(spec.loader)
                return spec
        return None


_FINDER = _Finder()
_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)


def _register(module: ModuleType) -> None:
    """Never raises what a transformers that is not as expected may cause: the user's import of it has nothing to do with it."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        _say_once(f"gemma4_fast: nothing is registered with transformers {version}, which is older than {oldest}")
        return
    try:
        REGISTRARS[module.__name__](module)
    except (ImportError, AttributeError, TypeError) as error:
        _say_once(f"gemma4_fast: could not register with {module.__name__} of transformers {version}: {error}")


def install() -> None:
    """Register with what is loaded already, and with the rest when it is. Calling it again changes nothing."""
    if _FINDER not in sys.meta_path:
        # It stays there: taking a finder out of the list while another thread walks over it would hide the one behind.
        sys.meta_path.insert(0, _FINDER)
    for name in REGISTRARS:
        if sys.modules.get(name) is not None:
            _register(importlib.import_module(name))  # not sys.modules[name]: another thread may still be executing it
