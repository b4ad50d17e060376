#include "cuda_driver.h"

#include "tdq_scale_lookup_ptx.h"

#include <dlfcn.h>

// cuda.h names some functions by macros that carry their version; the library has them under those names.
#define TDQ_TEXT(name) #name
#define TDQ_SYMBOL(name) TDQ_TEXT(name)

namespace tdq
{
namespace
{

//! The largest second dimension of a grid.
constexpr int32_t kMaxGridY = 65535;

//! Functions of the CUDA driver.
struct Driver
{
    decltype(&cuCtxGetDevice) ctxGetDevice{nullptr};
    decltype(&cuDeviceGetAttribute) deviceGetAttribute{nullptr};
    decltype(&cuModuleLoadData) moduleLoadData{nullptr};
    decltype(&cuModuleGetFunction) moduleGetFunction{nullptr};
    decltype(&cuModuleUnload) moduleUnload{nullptr};
    decltype(&cuLaunchKernel) launchKernel{nullptr};
    decltype(&cuGetErrorString) getErrorString{nullptr};
    std::string problem;

    Driver()
    {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            problem = "there is no CUDA driver (libcuda.so.1) on this machine";
            return;
        }
        find(library, TDQ_SYMBOL(cuCtxGetDevice), ctxGetDevice);
        find(library, TDQ_SYMBOL(cuDeviceGetAttribute), deviceGetAttribute);
        find(library, TDQ_SYMBOL(cuModuleLoadData), moduleLoadData);
        find(library, TDQ_SYMBOL(cuModuleGetFunction), moduleGetFunction);
        find(library, TDQ_SYMBOL(cuModuleUnload), moduleUnload);
        find(library, TDQ_SYMBOL(cuLaunchKernel), launchKernel);
        find(library, TDQ_SYMBOL(cuGetErrorString), getErrorString);
    }

    template <typename Function>
    void find(void* library, char const* name, Function& function)
    {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (function == nullptr)
        {
            problem = std::string("the CUDA driver has no function ") + name;
        }
    }

    std::string describe(char const* action, CUresult result) const
    {
        char const* text = nullptr;
        getErrorString(result, &text);
        return std::string(action) + ": " + (text == nullptr ? "unknown error of the CUDA driver" : text);
    }
};

Driver const& driver()
{
    static Driver const instance;
    return instance;
}

//! The kernel of the highest target that is not above the device; null if there is none.
Kernel const* kernelFor(int capability)
{
    Kernel const* found = nullptr;
    for (Kernel const& kernel : kKernels)
    {
        if (kernel.capability <= capability)
        {
            found = &kernel;
        }
    }
    return found;
}

} // namespace

LookupKernel::~LookupKernel()
{
    if (mModule != nullptr)
    {
        // fails if the context went first, and took the module with it
        driver().moduleUnload(mModule);
    }
}

std::string LookupKernel::load()
{
    if (mFunction != nullptr)
    {
        return {};
    }
    Driver const& cuda = driver();
    if (!cuda.problem.empty())
    {
        return cuda.problem;
    }
    CUdevice device{};
    int major = 0;
    int minor = 0;
    CUresult result = cuda.ctxGetDevice(&device);
    if (result == CUDA_SUCCESS)
    {
        result = cuda.deviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
    }
    if (result == CUDA_SUCCESS)
    {
        result = cuda.deviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
    }
    if (result != CUDA_SUCCESS)
    {
        return cuda.describe("asking for the current device", result);
    }
    Kernel const* kernel = kernelFor(10 * major + minor);
    if (kernel == nullptr)
    {
        return "GPUs of compute capability " + std::to_string(major) + "." + std::to_string(minor)
            + " are not supported; 8.0 is the first that is";
    }
    CUmodule module = nullptr;
    result = cuda.moduleLoadData(&module, kernel->ptx);
    if (result != CUDA_SUCCESS)
    {
        return cuda.describe("loading the kernel", result);
    }
    CUfunction function = nullptr;
    result = cuda.moduleGetFunction(&function, module, kernel->entry);
    if (result != CUDA_SUCCESS)
    {
        cuda.moduleUnload(module);
        return cuda.describe("finding the kernel in its module", result);
    }
    mModule = module;
    mFunction = function;
    mKernel = kernel;
    return {};
}

std::string LookupKernel::launch(void const* timestep, void const* table, void const* timesteps, void* scale,
    void* ratio, int32_t batch, int32_t rows, int32_t columns, CUstream stream) const
{
    if (mFunction == nullptr)
    {
        return "the kernel was not loaded before its launch";
    }
    if (batch == 0 || columns == 0)
    {
        return {};
    }
    int32_t const blocks = columns / mKernel->blockColumns + (columns % mKernel->blockColumns != 0 ? 1 : 0);
    if (rows < 1 || blocks > kMaxGridY)
    {
        return "a table of " + std::to_string(rows) + " rows and " + std::to_string(columns)
            + " columns cannot be looked up";
    }
    // the order of the kernel's parameters: inputs, sizes, outputs
    void* arguments[] = {&timestep, &table, &timesteps, &rows, &columns, &scale, &ratio};
    CUresult const result = driver().launchKernel(mFunction, static_cast<unsigned int>(batch),
        static_cast<unsigned int>(blocks), 1, mKernel->threads, 1, 1, mKernel->sharedBytes, stream, arguments, nullptr);
    return result == CUDA_SUCCESS ? std::string{} : driver().describe("launching the kernel", result);
}

} // namespace tdq
