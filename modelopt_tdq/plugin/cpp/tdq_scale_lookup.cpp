#include "tdq_scale_lookup.h"

#include "loaded_tensorrt.h"

#include <new>

static_assert(NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 13),
    "modelopt-tdq supports TensorRT 10.13 and later");

namespace tdq
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::PluginFieldCollection;

constexpr int32_t kInputs = 3;
constexpr int32_t kOutputs = 2;
//! Dimensions of timestep, table and timesteps.
constexpr int32_t kRanks[kInputs] = {1, 2, 1};
constexpr char const* kInputNames[kInputs] = {"timestep", "table", "timesteps"};

//! What TensorRT takes as failure.
constexpr int32_t kFailed = -1;

//! Write to TensorRT's log; returns kFailed.
int32_t fail(std::string const& problem) noexcept
{
    nvinfer1::ILogger* logger = findLogger();
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, (std::string(kName) + ": " + problem).c_str());
    }
    return kFailed;
}

//! Empty, or why tensors of these numbers of dimensions cannot be used.
template <typename Rank>
std::string rankProblem(int32_t nbInputs, int32_t nbOutputs, Rank rank)
{
    if (nbInputs != kInputs || nbOutputs != kOutputs)
    {
        return "it takes 3 inputs and has 2 outputs, not " + std::to_string(nbInputs) + " and "
            + std::to_string(nbOutputs);
    }
    for (int32_t i = 0; i < kInputs; ++i)
    {
        if (rank(i) != kRanks[i])
        {
            return std::string("input ") + kInputNames[i] + " has " + std::to_string(rank(i))
                + " dimensions; it takes timestep [B], table [K, Q] and timesteps [K]";
        }
    }
    return {};
}

std::string rowProblem(int64_t tableRows, int64_t times)
{
    return "the table has " + std::to_string(tableRows) + " rows, but there are " + std::to_string(times)
        + " timesteps: pass one time per row";
}

PluginFieldCollection const* noFields() noexcept
{
    static PluginFieldCollection const fields{0, nullptr};
    return &fields;
}

} // namespace

nvinfer1::IPluginCapability* ScaleLookup::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* ScaleLookup::clone() noexcept
{
    return new (std::nothrow) ScaleLookup; // each clone loads its kernel into the context that is current then
}

char const* ScaleLookup::getPluginName() const noexcept
{
    return kName;
}

char const* ScaleLookup::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* ScaleLookup::getPluginNamespace() const noexcept
{
    return kNamespace;
}

int32_t ScaleLookup::getNbOutputs() const noexcept
{
    return kOutputs;
}

int32_t ScaleLookup::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    if (nbInputs != kInputs || nbOutputs != kOutputs)
    {
        return fail(rankProblem(nbInputs, nbOutputs, [](int32_t i) { return kRanks[i]; }));
    }
    for (int32_t i = 0; i < kInputs; ++i)
    {
        if (inputTypes[i] != DataType::kFLOAT)
        {
            return fail(std::string("input ") + kInputNames[i] + " is not float32; cast it in front of the plugin");
        }
    }
    for (int32_t i = 0; i < kOutputs; ++i)
    {
        outputTypes[i] = DataType::kFLOAT;
    }
    return 0;
}

int32_t ScaleLookup::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /* shapeInputs */, int32_t /* nbShapeInputs */, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& /* exprBuilder */) noexcept
{
    std::string const problem = rankProblem(nbInputs, nbOutputs, [&](int32_t i) { return inputs[i].nbDims; });
    if (!problem.empty())
    {
        return fail(problem);
    }
    nvinfer1::IDimensionExpr const* rows = inputs[1].d[0];
    nvinfer1::IDimensionExpr const* times = inputs[2].d[0];
    if (rows->isConstant() && times->isConstant() && rows->getConstantValue() != times->getConstantValue())
    {
        return fail(rowProblem(rows->getConstantValue(), times->getConstantValue()));
    }
    for (int32_t i = 0; i < kOutputs; ++i)
    {
        outputs[i].nbDims = 2;
        outputs[i].d[0] = inputs[0].d[0];
        outputs[i].d[1] = inputs[1].d[1];
    }
    return 0;
}

bool ScaleLookup::supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
    int32_t /* nbInputs */, int32_t /* nbOutputs */) noexcept
{
    return inOut[pos].desc.type == DataType::kFLOAT && inOut[pos].desc.format == nvinfer1::TensorFormat::kLINEAR;
}

int32_t ScaleLookup::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* /* out */, int32_t nbOutputs) noexcept
{
    std::string const problem = rankProblem(nbInputs, nbOutputs, [&](int32_t i) { return in[i].desc.dims.nbDims; });
    return problem.empty() ? 0 : fail(problem);
}

int32_t ScaleLookup::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::PluginTensorDesc const* /* out */, int32_t nbOutputs) noexcept
{
    std::string problem = rankProblem(nbInputs, nbOutputs, [&](int32_t i) { return in[i].dims.nbDims; });
    if (problem.empty() && in[1].dims.d[0] != in[2].dims.d[0])
    {
        problem = rowProblem(in[1].dims.d[0], in[2].dims.d[0]);
    }
    if (problem.empty())
    {
        problem = mKernel.load(); // here, since enqueue may be captured into a CUDA graph
    }
    return problem.empty() ? 0 : fail(problem);
}

int32_t ScaleLookup::enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
    nvinfer1::PluginTensorDesc const* /* outputDesc */, void const* const* inputs, void* const* outputs,
    void* /* workspace */, cudaStream_t stream) noexcept
{
    auto const batch = static_cast<int32_t>(inputDesc[0].dims.d[0]);
    auto const rows = static_cast<int32_t>(inputDesc[1].dims.d[0]);
    auto const columns = static_cast<int32_t>(inputDesc[1].dims.d[1]);
    std::string const problem
        = mKernel.launch(inputs[0], inputs[1], inputs[2], outputs[0], outputs[1], batch, rows, columns, stream);
    return problem.empty() ? 0 : fail(problem);
}

nvinfer1::IPluginV3* ScaleLookup::attachToContext(nvinfer1::IPluginResourceContext* /* context */) noexcept
{
    return clone();
}

PluginFieldCollection const* ScaleLookup::getFieldsToSerialize() noexcept
{
    return noFields();
}

nvinfer1::IPluginV3* ScaleLookupCreator::createPlugin(
    char const* /* name */, PluginFieldCollection const* fc, nvinfer1::TensorRTPhase /* phase */) noexcept
{
    if (fc != nullptr && fc->nbFields > 0)
    {
        fail(std::string("it has no field '") + fc->fields[0].name + "'");
        return nullptr;
    }
    return new (std::nothrow) ScaleLookup;
}

PluginFieldCollection const* ScaleLookupCreator::getFieldNames() noexcept
{
    return noFields();
}

char const* ScaleLookupCreator::getPluginName() const noexcept
{
    return kName;
}

char const* ScaleLookupCreator::getPluginVersion() const noexcept
{
    return kVersion;
}

char const* ScaleLookupCreator::getPluginNamespace() const noexcept
{
    return kNamespace;
}

} // namespace tdq
