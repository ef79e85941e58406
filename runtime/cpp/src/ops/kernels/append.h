// New rows into the cache: rotary step, conversion to the type of the cache, scales.
#pragma once

#include <float.h>

#include "kernels.h"
#include "vectors.h"

namespace penguin {
namespace {

// y = rotated x, times `factor`: the halves of a head are the two coordinates that turn.
inline void rotate(const float* __restrict x, float* __restrict y, const float* __restrict cos,
                   const float* __restrict sin, int64_t size, float factor) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        y[i] = (a * cos[i] - b * sin[i]) * factor;
        y[i + half] = (b * cos[i] + a * sin[i]) * factor;
    }
}

// A head of a new row, turned to its position and times `factor`.
inline void place(const Attention& call, int64_t row, const float* x, float* y, float factor) {
    const int64_t at = call.positions[row] * (call.size / 2);
    rotate(x, y, call.cos + at, call.sin + at, call.size, factor);
}

inline void put(const float* x, float* to, float*, int64_t size) {
    memcpy(to, x, static_cast<size_t>(size) * sizeof(float));
}

inline void put(const float* x, HalfBits* to, float*, int64_t size) {
    for (int64_t d = 0; d < size; d += kWidth) store_half(to + d, load(x + d));
}

inline void put(const float* x, int8_t* to, float* scale, int64_t size) {
    Vec top{}, finite{};
    for (int64_t d = 0; d < size; d += kWidth) {
        const Vec y = load(x + d);
        top = larger(y < Vec{} ? -y : y, top);
        finite += y * splat(0.f);  // 0, or NaN where y is NaN or infinite
    }
    *scale = largest(top) / 127.f + sum_of(finite);
    if (!(*scale >= FLT_MIN)) {
        if (*scale < FLT_MIN) *scale = 0;
        memset(to, 0, static_cast<size_t>(size));
        return;
    }
    const Vec divisor = splat(*scale);
    typedef int8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));
    for (int64_t d = 0; d < size; d += kWidth) {
        const IntVec whole = __builtin_convertvector(rounded(load(x + d) / divisor), IntVec);
        *reinterpret_cast<Bytes*>(to + d) = __builtin_convertvector(whole, Bytes);
    }
}

template <class T>
void append_rows(const Attention& call, int64_t kv_head, int64_t first, int64_t last) {
    alignas(64) float turned[kLargestHead];
    for (int64_t row = first; row < last; row++) {
        const int64_t from = (row * call.kv_heads + kv_head) * call.size;
        const int64_t slot = kv_head * call.capacity + call.start + row;
        float* key_scale = call.key_scales ? call.key_scales + slot : nullptr;
        float* value_scale = call.value_scales ? call.value_scales + slot : nullptr;
        place(call, row, call.k + from, turned, 1.f);
        put(turned, static_cast<T*>(call.keys) + slot * call.size, key_scale, call.size);
        put(call.v + from, static_cast<T*>(call.values) + slot * call.size, value_scale, call.size);
    }
}

inline void append(const Attention& call, int64_t kv_head, int64_t first, int64_t last) {
    switch (call.type) {
        case CacheType::f32:
            return append_rows<float>(call, kv_head, first, last);
        case CacheType::f16:
            return append_rows<HalfBits>(call, kv_head, first, last);
        case CacheType::i8:
            return append_rows<int8_t>(call, kv_head, first, last);
    }
}

}  // namespace
}  // namespace penguin
