//! Registers the plugin when the library is loaded: trtexec --staticPlugins, `polygraphy --plugins`, ctypes.CDLL.
//!
//! Not together with entry_points.cpp: TensorRT refuses to load a library whose plugin is registered already.

#include "loaded_tensorrt.h"
#include "tdq_scale_lookup.h"

#include <cstdio>
#include <string>

namespace
{

bool registerPlugin()
{
    static tdq::ScaleLookupCreator creator;
    int32_t const loaded = tdq::loadedMajorVersion();
    nvinfer1::IPluginRegistry* registry = loaded == NV_TENSORRT_MAJOR ? tdq::findRegistry() : nullptr;
    if (registry == nullptr)
    {
        // without a logger, which is TensorRT's; calling another version's would crash
        std::fprintf(stderr, "%s: built for TensorRT %d, but %s is loaded; the plugin is not registered\n", tdq::kName,
            NV_TENSORRT_MAJOR, loaded == 0 ? "none" : ("version " + std::to_string(loaded)).c_str());
        return false;
    }
    // REGISTER_TENSORRT_PLUGIN would register it under the empty namespace
    return registry->registerCreator(creator, tdq::kNamespace);
}

[[maybe_unused]] bool const gRegistered = registerPlugin();

} // namespace
