// Calls the C++ plugin as TensorRT does, with sizes that are symbols; exits with the number of failed checks.

#include "tdq_scale_lookup.h"

#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

int gFailed = 0;
std::vector<std::string> gLog;

void check(bool condition, char const* what)
{
    if (!condition)
    {
        std::printf("failed: %s\n", what);
        ++gFailed;
    }
}

bool logged(char const* text)
{
    for (std::string const& line : gLog)
    {
        if (line.find(text) != std::string::npos)
        {
            gLog.clear();
            return true;
        }
    }
    return false;
}

class Log : public ILogger
{
    void log(Severity, char const* message) noexcept override
    {
        gLog.emplace_back(message);
    }
};

class Size : public IDimensionExpr, public apiv::VDimensionExpr
{
public:
    Size(int64_t value, bool constant)
        : mValue(value)
        , mConstant(constant)
    {
        mImpl = this;
    }
    bool isConstant() const override
    {
        return mConstant;
    }
    int64_t getConstantValue() const override
    {
        return mValue;
    }
    bool isSizeTensor() const override
    {
        return false;
    }

private:
    int64_t mValue;
    bool mConstant;
};

DimsExprs exprs(std::vector<Size const*> const& sizes)
{
    DimsExprs result{};
    result.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        result.d[i] = sizes[i];
    }
    return result;
}

PluginTensorDesc tensor(std::vector<int64_t> const& shape, DataType type = DataType::kFLOAT)
{
    PluginTensorDesc result{};
    result.dims.nbDims = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i)
    {
        result.dims.d[i] = shape[i];
    }
    result.type = type;
    result.format = TensorFormat::kLINEAR;
    return result;
}

void buildTime(tdq::ScaleLookup& plugin)
{
    check(std::strcmp(plugin.getPluginName(), "TdqScaleLookup") == 0, "name");
    check(std::strcmp(plugin.getPluginNamespace(), "tdq") == 0, "namespace");
    check(std::strcmp(plugin.getPluginVersion(), "1") == 0, "version");
    check(plugin.getNbOutputs() == 2, "outputs");
    check(plugin.getFieldsToSerialize()->nbFields == 0, "fields");
    for (auto type : {PluginCapabilityType::kCORE, PluginCapabilityType::kBUILD, PluginCapabilityType::kRUNTIME})
    {
        check(plugin.getCapabilityInterface(type) != nullptr, "capability");
    }

    DataType const good[] = {DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT};
    DataType const bad[] = {DataType::kFLOAT, DataType::kHALF, DataType::kFLOAT};
    DataType out[] = {DataType::kINT8, DataType::kINT8};
    check(plugin.getOutputDataTypes(out, 2, good, 3) == 0, "types");
    check(out[0] == DataType::kFLOAT && out[1] == DataType::kFLOAT, "types of the outputs");
    check(plugin.getOutputDataTypes(out, 2, bad, 3) != 0 && logged("input table is not float32"), "half table");
    check(plugin.getOutputDataTypes(out, 2, good, 2) != 0 && logged("3 inputs and has 2 outputs, not 2"), "2 inputs");

    Size const batch(-1, false), rows(20, true), other(19, true), columns(130, true), open(-1, false);
    alignas(IExprBuilder) char unused[sizeof(IExprBuilder)]; // the outputs' sizes are those of inputs
    auto& builder = reinterpret_cast<IExprBuilder&>(unused);
    DimsExprs outputs[2]{};
    DimsExprs const inputs[] = {exprs({&batch}), exprs({&rows, &columns}), exprs({&rows})};
    check(plugin.getOutputShapes(inputs, 3, nullptr, 0, outputs, 2, builder) == 0, "shapes");
    for (DimsExprs const& output : outputs)
    {
        check(output.nbDims == 2 && output.d[0] == &batch && output.d[1] == &columns, "shape of the outputs");
    }
    DimsExprs const dynamic[] = {exprs({&batch}), exprs({&open, &columns}), exprs({&rows})};
    check(plugin.getOutputShapes(dynamic, 3, nullptr, 0, outputs, 2, builder) == 0, "dynamic rows");
    DimsExprs const narrow[] = {exprs({&batch}), exprs({&rows, &columns}), exprs({&other})};
    check(plugin.getOutputShapes(narrow, 3, nullptr, 0, outputs, 2, builder) != 0
            && logged("the table has 20 rows, but there are 19 timesteps"),
        "rows and times");
    DimsExprs const flat[] = {exprs({&batch}), exprs({&rows}), exprs({&rows})};
    check(plugin.getOutputShapes(flat, 3, nullptr, 0, outputs, 2, builder) != 0
            && logged("input table has 1 dimensions"),
        "flat table");

    for (int32_t position = 0; position < 5; ++position)
    {
        std::vector<DynamicPluginTensorDesc> descriptors(5);
        for (auto& descriptor : descriptors)
        {
            descriptor.desc = tensor({4});
        }
        check(plugin.supportsFormatCombination(position, descriptors.data(), 3, 2), "float32, linear");
        descriptors[position].desc.type = DataType::kHALF;
        check(!plugin.supportsFormatCombination(position, descriptors.data(), 3, 2), "half");
        descriptors[position].desc.type = DataType::kFLOAT;
        descriptors[position].desc.format = TensorFormat::kCHW32;
        check(!plugin.supportsFormatCombination(position, descriptors.data(), 3, 2), "vectorized");
    }
}

void runTime(tdq::ScaleLookup& original, bool gpu)
{
    std::unique_ptr<IPluginV3> attached(original.attachToContext(nullptr));
    auto* plugin
        = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginTensorDesc const outputs[] = {tensor({8, 130}), tensor({8, 130})};
    PluginTensorDesc const narrow[] = {tensor({8}), tensor({20, 130}), tensor({19})};
    check(plugin->onShapeChange(narrow, 3, outputs, 2) != 0 && logged("20 rows, but there are 19"), "19 times");

    PluginTensorDesc const inputs[] = {tensor({8}), tensor({20, 130}), tensor({20})};
    float* const data = reinterpret_cast<float*>(0x1000);
    void const* const in[] = {data, data + 1, data + 2};
    void* const out[] = {data + 3, data + 4};
    if (!gpu)
    {
        check(plugin->onShapeChange(inputs, 3, outputs, 2) != 0 && logged("no CUDA driver"), "no driver");
        check(plugin->enqueue(inputs, outputs, in, out, nullptr, nullptr) != 0 && logged("not loaded"), "not loaded");
        return;
    }
    auto* stream = reinterpret_cast<cudaStream_t>(0x77);
    check(plugin->onShapeChange(inputs, 3, outputs, 2) == 0, "loading");
    check(plugin->onShapeChange(inputs, 3, outputs, 2) == 0, "loading again");
    check(plugin->enqueue(inputs, outputs, in, out, nullptr, stream) == 0, "launch");
    PluginTensorDesc const empty[] = {tensor({0}), tensor({20, 130}), tensor({20})};
    check(plugin->enqueue(empty, outputs, in, out, nullptr, stream) == 0, "empty batch");
    PluginTensorDesc const wide[] = {tensor({8}), tensor({20, 64 * 65535 + 1}), tensor({20})};
    check(plugin->enqueue(wide, outputs, in, out, nullptr, stream) != 0 && logged("cannot be looked up"), "too wide");
}

} // namespace

// What the plugin looks up in TensorRT.
extern "C" __attribute__((visibility("default"))) ILogger* getLogger() noexcept
{
    static Log log;
    return &log;
}

int main(int count, char**)
{
    tdq::ScaleLookupCreator creator;
    PluginFieldCollection const none{0, nullptr};
    PluginField const field("scale", nullptr, PluginFieldType::kFLOAT32, 0);
    PluginFieldCollection const one{1, &field};
    check(creator.getFieldNames()->nbFields == 0, "fields of the creator");
    check(creator.createPlugin("x", &one, TensorRTPhase::kBUILD) == nullptr && logged("no field 'scale'"), "a field");
    for (auto phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME})
    {
        std::unique_ptr<IPluginV3> plugin(creator.createPlugin("x", &none, phase));
        buildTime(static_cast<tdq::ScaleLookup&>(*plugin));
        runTime(static_cast<tdq::ScaleLookup&>(*plugin), count > 1);
    }
    check(gLog.empty(), gLog.empty() ? "" : gLog.front().c_str());
    return gFailed;
}
