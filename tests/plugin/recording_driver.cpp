// A CUDA driver that has one GPU and prints what it is asked to do.

#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace
{

int capability()
{
    char const* value = std::getenv("RECORDED_CAPABILITY");
    return value == nullptr ? 90 : std::atoi(value);
}

} // namespace

extern "C"
{

CUresult cuCtxGetDevice(CUdevice* device)
{
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice)
{
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? capability() / 10 : capability() % 10;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, void const* image)
{
    char target[16] = "";
    char const* found = std::strstr(static_cast<char const*>(image), ".target ");
    std::sscanf(found == nullptr ? "" : found, ".target %15s", target);
    std::printf("load %s\n", target);
    *module = reinterpret_cast<CUmodule>(0x11);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, char const* name)
{
    std::printf("function %s\n", name);
    *function = reinterpret_cast<CUfunction>(0x22);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module)
{
    std::printf("unload %p\n", static_cast<void*>(module));
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, char const** text)
{
    *text = "an error";
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
    unsigned blockY, unsigned blockZ, unsigned shared, CUstream stream, void** arguments, void**)
{
    std::printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p arguments", static_cast<void*>(function),
        gridX, gridY, gridZ, blockX, blockY, blockZ, shared, static_cast<void*>(stream));
    for (int i = 0; i < 7; ++i)
    {
        bool const size = i == 3 || i == 4;
        std::printf(" %#llx", size ? static_cast<unsigned long long>(*static_cast<std::uint32_t*>(arguments[i]))
                                   : static_cast<unsigned long long>(*static_cast<std::uintptr_t*>(arguments[i])));
    }
    std::printf("\n");
    return CUDA_SUCCESS;
}

} // extern "C"
