//! The lookup kernel on the current device: PTX in, launches out, through the CUDA driver.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

namespace tdq
{

//! Loads the kernel of the current device's compute capability and launches it.
//!
//! The driver's library is opened when it is first needed, and not linked: so this plugin can be built, loaded and
//! asked for shapes on a machine without a GPU.
class LookupKernel
{
public:
    LookupKernel() = default;
    ~LookupKernel();
    LookupKernel(LookupKernel const&) = delete;
    LookupKernel& operator=(LookupKernel const&) = delete;

    //! Load the kernel into the current context, unless it is there. Not during the capture of a CUDA graph.
    //!
    //! \return Empty, or what went wrong.
    std::string load();

    //! Look the times of `batch` samples up in a table [rows, columns].
    //!
    //! \return Empty, or what went wrong.
    std::string launch(void const* timestep, void const* table, void const* timesteps, void* scale, void* ratio,
        int32_t batch, int32_t rows, int32_t columns, CUstream stream) const;

private:
    CUmodule mModule{nullptr};
    CUfunction mFunction{nullptr};
    struct Kernel const* mKernel{nullptr};
};

} // namespace tdq
