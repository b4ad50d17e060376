"""Which distributions are installed, and whether they are what this package asks for."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

from modelopt_tdq.install import DISTRIBUTION

__all__ = ["DISTRIBUTION", "installed_version", "outdated"]


def installed_version(name: str) -> str | None:
    """Of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def outdated(extra: str) -> list[str]:
    """What is installed in a version that this package does not take, such as "onnx 1.10 (it takes >=1.18)".

    Args:
        extra: Whose requirements count, beside those that are always needed.
    """
    try:
        requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:  # used from a source tree that was never installed
        return []
    found = []
    for requirement in requirements:
        version = installed_version(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if wanted and version is not None and not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} (it takes {requirement.specifier})")
    return found
