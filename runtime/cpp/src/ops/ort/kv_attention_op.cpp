#include "kv_attention_op.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "isa.h"

namespace penguin::ort {
namespace {

enum Input : std::size_t {
    q,
    k,
    v,
    past_key,
    past_value,
    start,
    positions,
    cos,
    sin,
    past_key_scale,
    past_value_scale
};
enum Output : std::size_t { attention, present_key, present_value, present_key_scale, present_value_scale };

constexpr const char* kInputNames[] = {"q",         "k",   "v",   "past_key",       "past_value",      "start",
                                       "positions", "cos", "sin", "past_key_scale", "past_value_scale"};

const KvAttentionOp& op_of(const OrtCustomOp* op) { return *static_cast<const KvAttentionOp*>(op); }

std::size_t input_count(CacheType type) { return type == CacheType::i8 ? 11 : 9; }
std::size_t output_count(CacheType type) { return type == CacheType::i8 ? 5 : 3; }

const char* op_name(CacheType type) {
    return type == CacheType::i8 ? "KvAttentionInt8" : type == CacheType::f16 ? "KvAttentionHalf" : "KvAttention";
}

ONNXTensorElementDataType cache_element(CacheType type) {
    return type == CacheType::i8    ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
           : type == CacheType::f16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                    : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

ONNXTensorElementDataType input_element(CacheType type, std::size_t index) {
    if (index == past_key || index == past_value) return cache_element(type);
    if (index == start || index == positions) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

// The input whose shape an output has.
std::size_t input_of(std::size_t output) {
    constexpr std::size_t inputs[] = {q, past_key, past_value, past_key_scale, past_value_scale};
    return inputs[output];
}

// One node of a graph. Immutable, so that any number of threads may run it.
class Kernel {
   public:
    Kernel(const KvAttentionOp& op, const OrtKernelInfo* info) : api_(*op.api), type_(op.type) {
        check(api_.KernelInfoGetAttribute_int64(info, "num_heads", &heads_));
        check(api_.KernelInfoGetAttribute_int64(info, "kv_num_heads", &kv_heads_));
        scale_ = optional_scale(info);
        const IsaChoice& choice = chosen_isa();
        if (!choice.made) fail(choice.reason);
    }

    const OrtApi& api() const { return api_; }
    void compute(OrtKernelContext* context) const;

   private:
    [[noreturn]] void fail(const std::string& sentence) const {
        refuse(api_, std::string("penguin::") + op_name(type_) + ": " + sentence);
    }
    float optional_scale(const OrtKernelInfo* info) const;
    void want_shape(const TensorView* inputs, std::size_t index, std::initializer_list<std::int64_t> shape) const;
    void* present(OrtKernelContext* context, const TensorView* inputs, std::size_t output) const;

    const OrtApi& api_;
    CacheType type_;
    std::int64_t heads_ = 0;
    std::int64_t kv_heads_ = 0;
    float scale_ = 0;
};

float Kernel::optional_scale(const OrtKernelInfo* info) const {
    float scale = 0;
    OrtStatus* missing = api_.KernelInfoGetAttribute_float(info, "scale", &scale);
    if (!missing) return scale;
    api_.ReleaseStatus(missing);
    std::int64_t whole = 0;
    OrtStatus* not_an_integer = api_.KernelInfoGetAttribute_int64(info, "scale", &whole);
    if (!not_an_integer) fail("got an integer for the attribute scale, wanted a float");
    api_.ReleaseStatus(not_an_integer);
    return 0;
}

void Kernel::want_shape(const TensorView* inputs, std::size_t index, std::initializer_list<std::int64_t> shape) const {
    const TensorView& tensor = inputs[index];
    const TensorView wanted{tensor.type, shape.begin(), shape.size(), nullptr};
    if (tensor.rank == wanted.rank && std::equal(shape.begin(), shape.end(), tensor.shape)) return;
    fail(std::string("got ") + kInputNames[index] + " of shape " + tensor.shape_text() + ", wanted " +
         wanted.shape_text());
}

// The buffer of an output that continues an input, with the input's content.
void* Kernel::present(OrtKernelContext* context, const TensorView* inputs, std::size_t output) const {
    const TensorView& past = inputs[input_of(output)];
    OrtValue* value = nullptr;
    void* data = nullptr;
    check(api_.KernelContext_GetOutput(context, output, past.shape, past.rank, &value));
    check(api_.GetTensorMutableData(value, &data));
    if (data != past.data && past.count() > 0) {
        const std::size_t width = past.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? 4
                                  : past.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2
                                                                                       : 1;
        std::memmove(data, past.data, static_cast<std::size_t>(past.count()) * width);
    }
    return data;
}

// ONNX Runtime's own threads.
Status on_threads_of(const OrtApi& api, const OrtKernelContext* context, std::size_t count, ParallelFor::Task task,
                     void* data) {
    OrtStatus* status = api.KernelContext_ParallelFor(context, task, count, 0, data);
    if (!status) return {};
    Status error = Status::error(api.GetErrorMessage(status));
    api.ReleaseStatus(status);
    return error;
}

void Kernel::compute(OrtKernelContext* context) const {
    TensorView inputs[11];
    for (std::size_t i = 0; i < input_count(type_); i++) {
        const OrtValue* value = nullptr;
        check(api_.KernelContext_GetInput(context, i, &value));
        inputs[i] = view(api_, value);
    }
    const TensorView& cache = inputs[past_key];
    if (cache.rank != 4) fail("got past_key of shape " + cache.shape_text() + ", wanted [1, KV, C, D]");
    if (inputs[q].rank != 3) fail("got q of shape " + inputs[q].shape_text() + ", wanted [1, S, H * D]");
    if (inputs[cos].rank != 2) fail("got cos of shape " + inputs[cos].shape_text() + ", wanted [M, D / 2]");
    Attention call;
    call.rows = inputs[q].shape[1];
    call.heads = heads_;
    call.kv_heads = kv_heads_;
    call.capacity = cache.shape[2];
    call.size = cache.shape[3];
    call.table_rows = inputs[cos].shape[0];
    call.scale = scale_;
    call.type = type_;
    want_shape(inputs, q, {1, call.rows, heads_ * call.size});
    want_shape(inputs, k, {1, call.rows, kv_heads_ * call.size});
    want_shape(inputs, v, {1, call.rows, kv_heads_ * call.size});
    want_shape(inputs, past_key, {1, kv_heads_, call.capacity, call.size});
    want_shape(inputs, past_value, {1, kv_heads_, call.capacity, call.size});
    want_shape(inputs, start, {1});
    want_shape(inputs, positions, {call.rows});
    want_shape(inputs, cos, {call.table_rows, call.size / 2});
    want_shape(inputs, sin, {call.table_rows, call.size / 2});
    if (type_ == CacheType::i8) {
        want_shape(inputs, past_key_scale, {1, kv_heads_, call.capacity});
        want_shape(inputs, past_value_scale, {1, kv_heads_, call.capacity});
    }
    call.start = *static_cast<const std::int64_t*>(inputs[start].data);
    call.q = static_cast<const float*>(inputs[q].data);
    call.k = static_cast<const float*>(inputs[k].data);
    call.v = static_cast<const float*>(inputs[v].data);
    call.positions = static_cast<const std::int64_t*>(inputs[positions].data);
    call.cos = static_cast<const float*>(inputs[cos].data);
    call.sin = static_cast<const float*>(inputs[sin].data);

    OrtValue* out = nullptr;
    void* out_data = nullptr;
    check(api_.KernelContext_GetOutput(context, attention, inputs[q].shape, inputs[q].rank, &out));
    check(api_.GetTensorMutableData(out, &out_data));
    call.out = static_cast<float*>(out_data);
    call.keys = present(context, inputs, present_key);
    call.values = present(context, inputs, present_value);
    if (type_ == CacheType::i8) {
        call.key_scales = static_cast<float*>(present(context, inputs, present_key_scale));
        call.value_scales = static_cast<float*>(present(context, inputs, present_value_scale));
    }

    struct Threads {
        const OrtApi& api;
        const OrtKernelContext* context;
    } threads{api_, context};
    const ParallelFor parallel{[](void* of, std::size_t count, ParallelFor::Task task, void* data) {
                                   const Threads& its = *static_cast<Threads*>(of);
                                   return on_threads_of(its.api, its.context, count, task, data);
                               },
                               &threads};
    const Kernels* kernels = nullptr;
    Status status = find_kernels(call.size, &kernels);
    if (status.ok()) status = kv_attention(call, *kernels, parallel);
    if (!status.ok()) fail(status.sentence());
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** out) {
    return guarded(*op_of(op).api, [&] { *out = new Kernel(op_of(op), info); });
}

OrtStatus* infer_shapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
    const OrtApi& api = *op_of(op).api;
    return guarded(api, [&] {
        for (std::size_t output = 0; output < output_count(op_of(op).type); output++) {
            OrtTensorTypeAndShapeInfo* info = nullptr;
            check(api.ShapeInferContext_GetInputTypeShape(context, input_of(output), &info));
            check(api.ShapeInferContext_SetOutputTypeShape(context, output, info));
        }
    });
}

}  // namespace

KvAttentionOp::KvAttentionOp(const OrtApi& of, CacheType cache) : OrtCustomOp{}, api(&of), type(cache) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) { return op_name(op_of(op).type); };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return input_count(op_of(op).type); };
    GetInputType = [](const OrtCustomOp* op, std::size_t index) { return input_element(op_of(op).type, index); };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return output_count(op_of(op).type); };
    GetOutputType = [](const OrtCustomOp* op, std::size_t output) {
        return input_element(op_of(op).type, input_of(output));
    };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = GetInputCharacteristic;
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    InferOutputShapeFn = infer_shapes;
    CreateKernelV2 = create;
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        const Kernel& its = *static_cast<const Kernel*>(kernel);
        return guarded(its.api(), [&] { its.compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

}  // namespace penguin::ort
