// The operators penguin::kv_attention.out and penguin::kv_attention_int8.out of ExecuTorch. They register themselves
// when the library is loaded.
//
// | argument                 | shape          | dtype                                | access  |
// |--------------------------|----------------|--------------------------------------|---------|
// | q                        | [1, S, H, D]   | float32                              | read    |
// | k, v                     | [1, S, KV, D]  | float32                              | read    |
// | keys, values             | [1, KV, C, D]  | float32 or float16; int8             | (a!)    |
// | key_scales, value_scales | [1, KV, C]     | float32, kv_attention_int8 alone     | (a!)    |
// | start                    | [1]            | int64, the slot of the first new row | read    |
// | positions                | [S]            | int64, rotary position of each row   | read    |
// | cos, sin                 | [M, D / 2]     | float32                              | read    |
// | scale                    |                | float; 0: 1 / sqrt(D)                |         |
// | out                      | as q           | float32                              | written |
//
// What it computes, and what it refuses, stands in attention.h. A refusal is logged and fails the method.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <initializer_list>
#include <string>

#include "attention.h"
#include "isa.h"

namespace penguin::et {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

Status want(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<std::int64_t> shape) {
    bool same = tensor.scalar_type() == type && tensor.dim() == static_cast<std::int64_t>(shape.size());
    std::string got = "[", wanted = "[";
    for (int i = 0; i < static_cast<int>(tensor.dim()); i++) got += (i ? ", " : "") + std::to_string(tensor.size(i));
    int i = 0;
    for (const std::int64_t size : shape) {
        wanted += (i ? ", " : "") + std::to_string(size);
        same = same && tensor.size(i++) == size;
    }
    if (same) return {};
    return Status::error(std::string("got ") + name + " of shape " + got + "] and type " +
                         std::to_string(static_cast<int>(tensor.scalar_type())) + ", wanted " + wanted + "] and type " +
                         std::to_string(static_cast<int>(type)));
}

struct Arguments {
    const Tensor &q, &k, &v;
    Tensor &keys, &values;
    Tensor *key_scales, *value_scales;  // null but for int8
    const Tensor &start, &positions, &cos, &sin;
    double scale;
};

// Threads of ExecuTorch's own pool.
Status on_its_threads(void*, std::size_t count, ParallelFor::Task task, void* data) {
    const bool done = executorch::extension::parallel_for(0, static_cast<std::int64_t>(count), 1,
                                                          [task, data](std::int64_t begin, std::int64_t end) {
                                                              for (std::int64_t i = begin; i < end; i++)
                                                                  task(data, static_cast<std::size_t>(i));
                                                          });
    return done ? Status() : Status::error("got a failure of the thread pool");
}

Status compute(const Arguments& from, Tensor& out) {
    if (from.q.dim() != 4 || from.keys.dim() != 4 || from.cos.dim() != 2) {
        return Status::error("got q, keys or cos of another rank, wanted [1, S, H, D], [1, KV, C, D] and [M, D / 2]");
    }
    const ScalarType kept = from.key_scales                               ? ScalarType::Char
                            : from.keys.scalar_type() == ScalarType::Half ? ScalarType::Half
                                                                          : ScalarType::Float;
    Attention call;
    call.rows = from.q.size(1), call.heads = from.q.size(2), call.size = from.q.size(3);
    call.kv_heads = from.keys.size(1), call.capacity = from.keys.size(2), call.table_rows = from.cos.size(0);
    call.scale = static_cast<float>(from.scale);
    call.type = from.key_scales ? CacheType::i8 : kept == ScalarType::Half ? CacheType::f16 : CacheType::f32;
    const std::int64_t half = call.size / 2;
    for (const Status& status : {want("q", from.q, ScalarType::Float, {1, call.rows, call.heads, call.size}),
                                 want("k", from.k, ScalarType::Float, {1, call.rows, call.kv_heads, call.size}),
                                 want("v", from.v, ScalarType::Float, {1, call.rows, call.kv_heads, call.size}),
                                 want("keys", from.keys, kept, {1, call.kv_heads, call.capacity, call.size}),
                                 want("values", from.values, kept, {1, call.kv_heads, call.capacity, call.size}),
                                 want("start", from.start, ScalarType::Long, {1}),
                                 want("positions", from.positions, ScalarType::Long, {call.rows}),
                                 want("cos", from.cos, ScalarType::Float, {call.table_rows, half}),
                                 want("sin", from.sin, ScalarType::Float, {call.table_rows, half})}) {
        if (!status.ok()) return status;
    }
    if (from.key_scales) {
        for (Tensor* scales : {from.key_scales, from.value_scales}) {
            Status status = want("scales", *scales, ScalarType::Float, {1, call.kv_heads, call.capacity});
            if (!status.ok()) return status;
        }
        call.key_scales = from.key_scales->mutable_data_ptr<float>();
        call.value_scales = from.value_scales->mutable_data_ptr<float>();
    }
    if (executorch::runtime::resize_tensor(out, from.q.sizes()) != Error::Ok ||
        out.scalar_type() != ScalarType::Float) {
        return Status::error("got an output that cannot have the shape and type of q");
    }
    call.q = from.q.const_data_ptr<float>();
    call.k = from.k.const_data_ptr<float>();
    call.v = from.v.const_data_ptr<float>();
    call.keys = from.keys.mutable_data_ptr();
    call.values = from.values.mutable_data_ptr();
    call.start = *from.start.const_data_ptr<std::int64_t>();
    call.positions = from.positions.const_data_ptr<std::int64_t>();
    call.cos = from.cos.const_data_ptr<float>();
    call.sin = from.sin.const_data_ptr<float>();
    call.out = out.mutable_data_ptr<float>();
    const Kernels* kernels = nullptr;
    Status status = find_kernels(call.size, &kernels);
    return status.ok() ? kv_attention(call, *kernels, {on_its_threads, nullptr}) : status;
}

Tensor& finish(KernelRuntimeContext& context, const Arguments& from, Tensor& out) {
    const Status status = compute(from, out);
    if (!status.ok()) {
        ET_LOG(Error, "penguin::kv_attention: %s", status.sentence().c_str());
        context.fail(Error::InvalidArgument);
    }
    return out;
}

}  // namespace

Tensor& kv_attention_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& keys,
                         Tensor& values, const Tensor& start, const Tensor& positions, const Tensor& cos,
                         const Tensor& sin, double scale, Tensor& out) {
    return finish(context, {q, k, v, keys, values, nullptr, nullptr, start, positions, cos, sin, scale}, out);
}

Tensor& kv_attention_int8_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                              Tensor& keys, Tensor& values, Tensor& key_scales, Tensor& value_scales,
                              const Tensor& start, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                              double scale, Tensor& out) {
    return finish(context, {q, k, v, keys, values, &key_scales, &value_scales, start, positions, cos, sin, scale}, out);
}

}  // namespace penguin::et

EXECUTORCH_LIBRARY(penguin, "kv_attention.out", penguin::et::kv_attention_out);
EXECUTORCH_LIBRARY(penguin, "kv_attention_int8.out", penguin::et::kv_attention_int8_out);
