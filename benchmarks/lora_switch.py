#!/usr/bin/env python3
"""Two LoRAs with one quantization setup: what each way to the engine of a LoRA is worth (tiny random pipeline)."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import write

from trt_examples.lora.lora import measured, table_of

if __name__ == "__main__":
    rows = measured()
    write("lora_switch", {"rows": [asdict(row) for row in rows]}, table_of(rows))
