"""CI installs and tests with the README's own command. What else the README says: tests/docs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BASH = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_ci_runs_the_test_command() -> None:
    (tests,) = [line for line in BASH if "pytest" in line]
    install = tests.split("activate && ")[1]
    ci = (ROOT / ".ci/run").read_text().replace("--quiet ", "")
    assert install in ci
