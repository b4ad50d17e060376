"""The command line: ``modelopt-tdq``.

Read ``app`` first; every command has a file of its name.
"""

from modelopt_tdq.cli.app import app

__all__ = ["app"]
