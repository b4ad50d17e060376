"""StandIn: looks like a torch model that something else computes for, and lets nobody change that model unnoticed.

Whoever changes the torch model now (a LoRA, other attention processors, other weights) would see no effect, as the
engine was built from what the model was. So what could change it is refused, where it is tried.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from modelopt_tdq.errors import TdqError

__all__ = ["StandIn"]

#: Methods that change nothing of what a model computes: those that tell or write something, and those that diffusers'
#: pipelines call while they sample.
_HARMLESS = frozenset(
    {
        "_reset_stateful_cache",  # at the end of every call of a pipeline
        "build_attention_mask",
        "build_rotary_emb_for_absolute_positions",
        "get_memory_footprint",
        "num_parameters",
        "post_process_latents",
        "push_to_hub",
        "save_config",
        "save_pretrained",
        "to_json_file",
        "to_json_string",
    }
)


class StandIn(nn.Module):
    """In the place of ``original``: everything but the computation - ``config``, submodules, its class - is its own.

    Methods of the original that could change what it computes are refused when they are called: all but context
    managers, class methods, static methods and a few that only tell something. ``original`` itself can be changed, for
    another export.

    Args:
        original: The torch model.
    """

    #: For those that cannot import this module, and want the torch model.
    restored_by: ClassVar[str] = "modelopt_tdq.restore_denoiser(pipeline)"

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_original", original)  # not a submodule: its weights are not this module's
        # the class and its module are what diffusers writes into the index of a saved pipeline
        object.__setattr__(self, "__module__", type(original).__module__)
        object.__setattr__(self, "_processors", _processors(original))
        self.register_forward_pre_hook(_require_same_processors)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """That of the original, so that whoever treats models by their class treats this one the same."""
        original = self.__dict__.get("_original")
        return type(self) if original is None else type(original)

    @property
    def original(self) -> nn.Module:
        """The torch model that this one stands for."""
        found: nn.Module = self._original
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original: Any = object.__getattribute__(self, "_original")
        value = getattr(original, name)
        is_own = inspect.ismethod(value) and id(value.__self__) == id(original)
        if is_own and not _is_harmless(name, value):
            return _refusing(original, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        original = self.__dict__.get("_original")
        if original is not None and any(name in own for own in (original._modules, original._parameters)):
            raise _refused(original, name)
        super().__setattr__(name, value)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the engine holds its weights itself."""
        raise _refused(self.original, "load_state_dict")

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """This module, and a stand-in of each of the original's parts: who walks them to change them is refused too.

        ``pipeline.unfuse_lora()`` and the caches of diffusers reach the layers in this way.
        """
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name, module in self.original.named_modules(remove_duplicate=remove_duplicate):
            if name:
                yield f"{prefix}.{name}" if prefix else name, _Part(module)


class _Part(StandIn):
    """In the place of a part of a model that an engine computes for. It can be looked at, and nothing else."""

    def __init__(self, original: nn.Module) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "_original", original)

    def __getattribute__(self, name: str) -> Any:
        # nn.Module's own methods, which __getattr__ is not asked for
        if name.startswith("register_") or name in ("_apply", "apply", "train", "requires_grad_"):
            original = object.__getattribute__(self, "_original")
            return _refusing(original, name, getattr(original, name))
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_original" in self.__dict__:
            raise _refused(self.original, name)
        super().__setattr__(name, value)


def _is_harmless(name: str, method: Callable[..., Any]) -> bool:
    # calling a context manager changes nothing yet: diffusers' cache_context tells hooks which call this is
    function = inspect.unwrap(method)
    is_context = function is not getattr(method, "__func__", method) and inspect.isgeneratorfunction(function)
    return is_context or name in _HARMLESS


def _refused(original: nn.Module, what: str) -> TdqError:
    return TdqError(
        what,
        type(original).__name__,
        "an engine computes in place of this model, and would not change with it",
        "Put the torch model back with modelopt_tdq.restore_denoiser(pipeline), change it, and quantize, export and "
        "swap it again",
    )


def _refusing(original: nn.Module, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise _refused(original, name)

    return refuse


#: Of an attention processor: its class, and what can be told of its settings, such as the scale of an IP-Adapter.
_Settings = tuple[type, str]


def _settings(layer: Any) -> _Settings:
    processor = layer.processor
    plain = {k: v for k, v in vars(processor).items() if isinstance(v, (bool, int, float, str, list, tuple))}
    plain.pop("training", None)
    return type(processor), repr(plain)


def _processors(original: nn.Module) -> list[tuple[str, nn.Module, _Settings]]:
    """The layers with an attention processor."""
    named = original.named_modules()
    return [(n, m, _settings(m)) for n, m in named if hasattr(getattr(m, "processor", None), "__dict__")]


def _require_same_processors(module: Any, args: tuple[Any, ...]) -> None:
    """Pre-hook: pipelines change the settings of processors past every method of the model."""
    for name, layer, before in () if torch.compiler.is_compiling() else module._processors:
        if _settings(layer) != before:
            raise _refused(module.original, f"{name}.processor")
