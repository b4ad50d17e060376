"""The zoo has every class of the installed diffusers that takes a time, and its models depend on all that they take."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.zoo.catalogue import ENTRIES, SKIPPED, find_entry
from modelopt_tdq.lab.zoo.classes import time_arguments, timed_classes

#: Of different build: convolutions, attention over frames, streams, packed sequences, experts, several times.
RUN = (
    "UNet1DModel",
    "UNet2DModel",
    "UNet2DConditionModel",
    "UNetMotionModel",
    "Kandinsky3UNet",
    "StableCascadeUNet",
    "UniDiffuserModel",
    "DiTTransformer2DModel",
    "DreamLiteTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "HunyuanDiT2DModel",
    "OmniGenTransformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "SD3Transformer2DModel",
    "ZImageTransformer2DModel",
    "FluxTransformer2DModel",
    "NucleusMoEImageTransformer2DModel",
    "QwenImageTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CosmosTransformer3DModel",
    "Cosmos3OmniTransformer",
    "HunyuanVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "MochiTransformer3DModel",
    "SanaWMTransformer3DModel",
    "WanTransformer3DModel",
    "AceStepTransformer1DModel",
    "StableAudioDiTModel",
    "T5FilmDecoder",
    "PriorTransformer",
    "RFD4ProteinaTransformer",
    "MultiControlNetModel",
    "UNetControlNetXSModel",
    "ZImageControlNetModel",
)


def _outputs(name: str, time: float, seed: int = 0) -> list[Tensor]:
    """Of a new model each time, at this part of its largest time."""
    entry = find_entry(name)
    model = entry.build()
    assert all(parameter.numel() for parameter in model.parameters()), "so small that a layer is empty"
    with torch.no_grad():
        output: Any = model(**entry.inputs(time=time * entry.largest, seed=seed))
    leaves = pytree.tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_class_has_an_entry_or_a_reason() -> None:
    missing = set(timed_classes()) - set(ENTRIES) - set(SKIPPED)
    assert not missing, (
        f"this diffusers has classes that take a time and are not in the zoo: {sorted(missing)}. Add an Entry to the "
        "file of their kind in modelopt_tdq/lab/zoo/, or a true reason to SKIPPED in catalogue.py"
    )


def test_the_zoo_has_no_class_that_diffusers_has_not() -> None:
    unknown = (set(ENTRIES) | set(SKIPPED)) - set(timed_classes())
    assert not unknown, f"take these out of modelopt_tdq/lab/zoo/, or install a diffusers that has them: {unknown}"
    assert not set(ENTRIES) & set(SKIPPED)


def test_entries_say_nothing_of_arguments_that_the_class_has_not() -> None:
    for name, entry in ENTRIES.items():
        model = timed_classes()[name]
        assert set(entry.arguments) <= set(inspect.signature(model.forward).parameters), name
        assert set(entry.config) <= set(inspect.signature(model.__init__).parameters), name
        assert entry.times, name
        assert set(entry.times) <= set(time_arguments(model)), name


@pytest.mark.parametrize("name", RUN)
def test_its_model_depends_on_time_and_inputs_and_on_nothing_else(name: str) -> None:
    outputs = _outputs(name, 0.5)
    assert outputs
    assert all(output.isfinite().all() for output in outputs)
    assert _same(outputs, _outputs(name, 0.5))
    assert not _same(outputs, _outputs(name, 0.9))
    assert not _same(outputs, _outputs(name, 0.5, seed=1))


def test_a_class_without_an_entry_is_refused_with_its_reason() -> None:
    with pytest.raises(TdqError, match="never read it"):
        find_entry("TransformerTemporalModel")
    with pytest.raises(TdqError, match="no such class"):
        find_entry("UNet9DModel")
