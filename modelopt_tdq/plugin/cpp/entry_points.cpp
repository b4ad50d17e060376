//! What IPluginRegistry::loadLibrary calls: trtexec --dynamicPlugins, and libraries that are stored in the engine.

#include "loaded_tensorrt.h"
#include "tdq_scale_lookup.h"

#define TDQ_EXPORT extern "C" __attribute__((visibility("default")))

TDQ_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    tdq::setFinder(finder);
}

TDQ_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static tdq::ScaleLookupCreator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    nbCreators = 1;
    return creators;
}
