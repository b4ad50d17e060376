"""The demo: one real model, quantized with static scales and with scales over time, judged and deployed.

Read ``run`` first, then ``stages``.
"""

from modelopt_tdq.lab.demo.run import run_demo
from modelopt_tdq.lab.demo.settings import DemoSettings

__all__ = ["DemoSettings", "run_demo"]
