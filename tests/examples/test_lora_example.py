"""trt_examples/lora: two LoRAs, one quantization setup."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("diffusers")

from trt_examples.lora import lora


@pytest.mark.slow
def test_what_is_done_again_and_what_it_is_worth() -> None:
    rows = {(row.lora, row.way): row for row in lora.measured()}
    assert len(rows) == 8
    for name in ("A", "B"):
        anew, nothing, table, scales = (rows[name, way] for way in ("anew", "nothing", "table", "scales"))
        # the engine is what torch is, whichever table it was given
        for row in (anew, nothing, table, scales):
            assert row.engine_db == pytest.approx(row.torch_db, abs=0.3)
        assert nothing.torch_db < table.torch_db < scales.torch_db
        assert scales.torch_db > anew.torch_db - 0.5
        assert table.seconds < scales.seconds
        assert table.exported
        assert not scales.exported
