//! What this library takes from the TensorRT that has loaded it.
//!
//! Looked up instead of linked: the headers are enough to build; and Python's wheel and trtexec load TensorRT without
//! making its symbols global, so that an undefined symbol of this library would not be found.
#pragma once

#include <NvInferRuntime.h>

namespace tdq
{

//! The major version of TensorRT that is loaded, or 0.
int32_t loadedMajorVersion() noexcept;

//! The global registry of plugins, or null if no TensorRT is loaded. Its functions are those of this library's headers
//! if the major versions agree.
nvinfer1::IPluginRegistry* findRegistry() noexcept;

//! Where to log: that of `setLoggerFinder` if there is one, else TensorRT's own; null if there is none.
nvinfer1::ILogger* findLogger() noexcept;

//! Take the logger from this one from now on.
void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

} // namespace tdq
