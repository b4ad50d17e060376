//! Registers the plugin when the library is loaded: trtexec --staticPlugins, `polygraphy --plugins`, ctypes.CDLL.
//!
//! Not together with entry_points.cpp: TensorRT refuses to load a library whose plugin is registered already.

#include "loaded_tensorrt.h"
#include "tdq_scale_lookup.h"

#include <cstdio>

namespace
{

bool registerPlugin()
{
    static tdq::ScaleLookupCreator creator;
    nvinfer1::IPluginRegistry* registry = tdq::findRegistry();
    if (registry == nullptr)
    {
        // there is no logger either
        std::fprintf(stderr, "%s: load TensorRT %d first; the plugin is not registered\n", tdq::kName,
            NV_TENSORRT_MAJOR);
        return false;
    }
    // REGISTER_TENSORRT_PLUGIN would register it under the empty namespace
    return registry->registerCreator(creator, tdq::kNamespace);
}

[[maybe_unused]] bool const gRegistered = registerPlugin();

} // namespace
