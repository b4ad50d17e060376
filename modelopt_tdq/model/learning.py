"""The module in the root of a model that learns its scales, as the rest of the package knows it."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn

from modelopt_tdq.model.timestep import INTERVALS, CurrentTimestep

__all__ = ["Learning", "find_learning", "forget_learning"]


class Learning(Protocol):
    """What a model that learns has under the name :data:`~modelopt_tdq.model.timestep.INTERVALS`."""

    def begin(self, root: nn.Module, timestep: CurrentTimestep) -> None:
        """A call of the root begins."""

    def refresh(self, root: nn.Module) -> None:
        """Make the tables of the quantizers anew if what they are made from has changed."""

    def keep_tables(self) -> None:
        """The tables of the quantizers were set by hand: they stay until they are made anew on demand."""

    def unlearn(self, root: nn.Module) -> None:
        """Make every learned quantizer the ordinary one that it was made from; its scales stay."""


def find_learning(model: nn.Module) -> Learning | None:
    """What makes the intervals of ``model``; None if it does not learn."""
    return cast("Learning | None", model._modules.get(INTERVALS))


def forget_learning(model: nn.Module) -> None:
    """Turn every learned quantizer of ``model`` into the ordinary one it was made from; its scales stay.

    A second calibration starts with it. Nothing happens to a model that does not learn.
    """
    learning = find_learning(model)
    if learning is not None:
        learning.unlearn(model)
