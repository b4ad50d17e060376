"""The presets as files: arguments of ``modelopt_tdq.make_config``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import TdqError

__all__ = ["RECIPES", "read_recipe"]

#: Names of the bundled recipes.
RECIPES = ("int8", "fp8", "w8a4", "w4a8", "w4a4", "w3a3")

#: What a recipe may hold: arguments, and the fields of the algorithm as one mapping.
_KEYS = ("algorithm", "conv_transpose", "activation_bits", "high_precision", "weight_bits")


def read_recipe(name: str) -> dict[str, Any]:
    """The content of a bundled recipe, or of a YAML file of the same form; its values are not checked.

    Raises:
        TdqError: There is no such recipe or file, it is no YAML, or it holds something else.
    """
    import yaml

    source = resources.files(__name__) / f"{name}.yaml" if name in RECIPES else Path(name)
    if not source.is_file():
        raise TdqError("recipe", name, "neither a bundled recipe nor a file", f"Bundled: {', '.join(RECIPES)}")
    form = "See modelopt_tdq/recipes for the form"
    try:
        arguments = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TdqError("recipe", name, f"not readable as YAML ({error})", form) from error
    if not isinstance(arguments, dict):
        raise TdqError("recipe", name, "not a mapping", form)
    if unknown := sorted(map(str, arguments.keys() - set(_KEYS))):
        raise TdqError("recipe", unknown, "unknown keys", f"Known: {', '.join(sorted(_KEYS))}")
    if not isinstance(arguments.get("algorithm") or {}, dict):
        raise TdqError("recipe", arguments["algorithm"], "the algorithm is not a mapping", form)
    return arguments
