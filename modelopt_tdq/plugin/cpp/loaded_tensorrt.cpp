#include "loaded_tensorrt.h"

#include <dlfcn.h>

#define TDQ_TEXT(value) #value
#define TDQ_EXPANDED(value) TDQ_TEXT(value)

namespace tdq
{
namespace
{

nvinfer1::ILoggerFinder* gFinder = nullptr;

template <typename Function>
Function find(char const* name) noexcept
{
    void* symbol = dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr)
    {
        void* loaded = dlopen("libnvinfer.so." TDQ_EXPANDED(NV_TENSORRT_MAJOR), RTLD_LAZY | RTLD_NOLOAD);
        symbol = loaded == nullptr ? nullptr : dlsym(loaded, name);
    }
    return reinterpret_cast<Function>(symbol);
}

} // namespace

int32_t loadedMajorVersion() noexcept
{
    auto const function = find<decltype(&getInferLibMajorVersion)>("getInferLibMajorVersion");
    return function == nullptr ? 0 : function();
}

nvinfer1::IPluginRegistry* findRegistry() noexcept
{
    auto const function = find<decltype(&getPluginRegistry)>("getPluginRegistry");
    return function == nullptr ? nullptr : function();
}

nvinfer1::ILogger* findLogger() noexcept
{
    if (gFinder != nullptr)
    {
        return gFinder->findLogger();
    }
    static auto const function = find<decltype(&getLogger)>("getLogger");
    return function == nullptr ? nullptr : function();
}

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gFinder = finder;
}

} // namespace tdq
