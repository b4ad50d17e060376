"""``tensorrt`` for the process that builds: the builder of TensorRT-RTX, which records what only TensorRT is asked for.

Tests copy this file as ``tensorrt.py`` to a folder on that process's path. Lines of ``record.txt`` beside it tell what
was asked. With ``plugin_package.txt`` beside it, which names the folder of the tests of the plugin, NVIDIA's package of
Python plugins is there too.
"""

import sys
from pathlib import Path

import tensorrt_rtx

_HERE = Path(__file__).parent
_PLUGIN_PACKAGE = _HERE / "plugin_package.txt"
globals().update({name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")})
__version__ = "11.4.0.106"


def _record(*what: object) -> None:
    with (_HERE / "record.txt").open("a") as file:
        print(*what, file=file)


class NetworkDefinitionCreationFlag:
    """An enumeration with the member that TensorRT-RTX lacks."""

    STRONGLY_TYPED = 1
    PREFER_AOT_PYTHON_PLUGINS = 3


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return b"times of this GPU"


class _Config:
    def __init__(self, real: object) -> None:
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "hardware_compatibility_level":
            _record(name, value.name)
        else:
            setattr(self._real, name, value)

    def set_flag(self, flag: object) -> None:
        _record("flag", flag.name)

    def create_timing_cache(self, blob: bytes) -> object:
        return None if blob == b"damaged" else _TimingCache(blob)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        _record("timing cache", cache.content.decode() or "empty", ignore_mismatch)
        self.__dict__["_cache"] = cache
        return cache.content != b"foreign"

    def get_timing_cache(self) -> _TimingCache:
        return self._cache


class Builder:
    """TensorRT-RTX's, with the configuration above."""

    def __init__(self, logger: object) -> None:
        self._real = tensorrt_rtx.Builder(logger)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def create_network(self, flags: int) -> object:
        _record("network", flags)
        return self._real.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def create_builder_config(self) -> _Config:
        return _Config(self._real.create_builder_config())

    def build_serialized_network(self, network: object, config: _Config) -> object:
        return self._real.build_serialized_network(network, config._real)


if _PLUGIN_PACKAGE.is_file():
    sys.path.append(_PLUGIN_PACKAGE.read_text())
    from stand_in_tensorrt import stand_in

    _own = globals()
    _context = stand_in()
    _module = _context.__enter__()  # now `tensorrt` is this module, with `tensorrt.plugin`
    for _name in ("NetworkDefinitionCreationFlag", "Builder", "_context", "__spec__"):
        setattr(_module, _name, _own[_name])
