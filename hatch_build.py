"""Puts the bundled model into wheels. An editable install finds it in its checkout and gets no folder beside it.

Such a folder would stay importable, and empty, when the checkout is moved.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BundledModel(BuildHookInterface[Any]):
    """The only hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build."""
        if version == "standard":
            build_data["force_include"]["trt_examples/ddim_cifar10/model"] = "modelopt_tdq/lab/demo/model"
