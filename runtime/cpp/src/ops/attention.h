// Attention over a KV cache that is appended in place: grouped queries, causal, rotary step inside.
//
// | tensor                   | shape                      | dtype                     | access        |
// |--------------------------|----------------------------|---------------------------|---------------|
// | q                        | [rows, heads, size]        | float32                   | read          |
// | k, v                     | [rows, kv_heads, size]     | float32                   | read          |
// | keys, values             | [kv_heads, capacity, size] | float32, float16 or int8  | rows appended |
// | key_scales, value_scales | [kv_heads, capacity]       | float32, int8 caches only | rows appended |
// | positions                | [rows]                     | int64                     | read          |
// | cos, sin                 | [table_rows, size / 2]     | float32                   | read          |
// | out                      | [rows, heads, size]        | float32                   | written       |
//
// Row i goes to slot start + i and attends to slots 0 to start + i. What lies in later slots is never read.
// An int8 row is x / scale rounded to the nearest integer, halves to even, with scale = max|x| / 127. A row whose scale
// would be below the smallest normal float is stored as zeros with scale 0. A row with NaN or infinity has scale NaN,
// so that what attends to it is NaN. float16 holds up to 65,504; larger numbers become infinity.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace penguin {

struct Kernels;

enum class CacheType { f32, f16, i8 };

struct Attention {
    const float* q = nullptr;
    const float* k = nullptr;
    const float* v = nullptr;
    void* keys = nullptr;
    void* values = nullptr;
    float* key_scales = nullptr;
    float* value_scales = nullptr;
    const std::int64_t* positions = nullptr;
    const float* cos = nullptr;
    const float* sin = nullptr;
    float* out = nullptr;
    std::int64_t rows = 0;
    std::int64_t heads = 0;
    std::int64_t kv_heads = 0;
    std::int64_t size = 0;  // of one head
    std::int64_t capacity = 0;
    std::int64_t start = 0;
    std::int64_t table_rows = 0;
    float scale = 0;  // of the scores; 0: 1 / sqrt(size)
    CacheType type = CacheType::f32;
};

constexpr std::int64_t kSmallestHead = 32;
constexpr std::int64_t kLargestHead = 256;
constexpr std::int64_t kHeadStep = 8;

// Threads of the caller: calls task(data, i) once for each i below count, in any order, and returns when all are done.
struct ParallelFor {
    using Task = void (*)(void* data, std::size_t index);
    Status (*run)(void* context, std::size_t count, Task task, void* data);
    void* context;
};

// Runs the tasks one after another on the calling thread.
ParallelFor serial();

// Appends the new rows and computes `out`. The result is equal bit for bit whatever threads there are.
// Errors, each before anything is written: a size, a slot or a position out of range, a null or misaligned buffer.
Status kv_attention(const Attention& call, const Kernels& kernels, const ParallelFor& parallel);

}  // namespace penguin
