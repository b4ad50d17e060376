from __future__ import annotations

import pytest
from small_runs import calibrated, held_out, last_block_error, reconstructed

import modelopt_tdq as tdq


@pytest.mark.parametrize("intervals", ["thin", "mlp", "table", "static"])
def test_lower_error_on_inputs_that_were_not_seen(intervals: str) -> None:
    model = reconstructed(intervals=intervals)
    report = tdq.reconstruction_report(model)
    assert [block.name for block in report] == ["conv1", "mix", "conv2"]
    assert all(block.kept and block.error_after < block.error_before for block in report)
    start = calibrated(bins="per_step" if intervals == "table" else 1)
    assert last_block_error(model, held_out()) < 0.8 * last_block_error(start, held_out())
