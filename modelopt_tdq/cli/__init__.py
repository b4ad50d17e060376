"""The command line: ``modelopt-tdq``."""

from modelopt_tdq.cli.app import app

__all__ = ["app"]
