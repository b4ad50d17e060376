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


class _RegisterBehindImport(MetaPathFinder):
    """Finds ``modelopt.torch`` once, as Python itself would, and registers as soon as it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODELOPT:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
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
