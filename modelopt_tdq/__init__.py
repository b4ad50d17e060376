"""Time-step-aware quantization for diffusion models: a plugin to NVIDIA ModelOpt.

Importing this package registers its algorithms with ModelOpt: ``{"method": "tdq"}``, ``"tdq_correct"``, ``"tdq_qat"``,
``"tdq_reconstruct"`` and ``"tdq_temporal"``. It has to be imported before a model quantized with one of them is
restored. The public names are listed in ``__init__.pyi``, in the order in which they are needed; each is imported when
it is first used.
"""

import lazy_loader

from modelopt_tdq.registration import register_with_modelopt
from modelopt_tdq.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_with_modelopt()
