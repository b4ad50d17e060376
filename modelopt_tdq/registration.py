"""When the algorithms are registered with ModelOpt: as soon as ModelOpt is loaded, and not before.

ModelOpt takes ten seconds to import, which ``modelopt-tdq --help`` need not wait for. Whoever restores a model imports
ModelOpt anyway, so registering right behind that import is as good as at ``import modelopt_tdq``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["register_with_modelopt"]

#: What ModelOpt's users import a part of; it loads all of its parts.
_MODELOPT = "modelopt.torch"

#: Our own modules, some of which import ModelOpt. What registers imports many of them.
_OURS = __name__.partition(".")[0] + "."


class _RegisterBehindImport(MetaPathFinder):
    """Finds ``modelopt.torch`` and our own modules, as Python itself would, and registers when the former is there.

    Not before the last of our own modules that are being imported is complete: one of them may be what imports
    ModelOpt, and what registers needs it.
    """

    def __init__(self) -> None:
        self._running = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODELOPT and not fullname.startswith(_OURS):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self._running += 1
            try:
                execute(module)
            finally:
                self._running -= 1
            if not self._running and _MODELOPT in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    from modelopt_tdq.modes import register

    register()


def register_with_modelopt() -> None:
    """Register now if ModelOpt is loaded, else once it is; harmless when done before."""
    if _MODELOPT in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterBehindImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterBehindImport())
