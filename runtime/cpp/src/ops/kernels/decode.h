// One new row over a split of the positions: keys and values are read once for up to four query heads.
#pragma once

#include "append.h"
#include "softmax.h"

namespace penguin {
namespace {

// A run of positions in the cache of one KV head.
template <class T>
struct Span {
    const T* keys;
    const T* values;
    const float* key_scales;  // null but for int8
    const float* value_scales;
    int64_t count;
};

template <class T>
Span<T> span_of(const Attention& call, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t slot = kv_head * call.capacity + begin;
    return {static_cast<const T*>(call.keys) + slot * call.size, static_cast<const T*>(call.values) + slot * call.size,
            call.key_scales ? call.key_scales + slot : nullptr, call.value_scales ? call.value_scales + slot : nullptr,
            end - begin};
}

// Rows of values added before the next part of a head's numbers: few, so that memory is read in its order; more where
// all numbers fit the registers.
constexpr int kValuesAtOnce = kWidth == 16 ? 16 : 4;

// How many keys are multiplied side by side, so that the sums of all heads fill whole vectors.
template <int kHeads>
constexpr int kKeysAtOnce = (kAccumulators < kWidth ? kWidth : kAccumulators) / kHeads;

// Products of kHeads queries with the next keys; scores of head h begin at h * kTile. With kWhole all of them are
// there; else `left` are, and the last one stands for the missing.
template <int kHeads, bool kWhole, class T>
inline void multiply_keys(const float* q, const T* keys, int64_t size, int64_t left, float* scores) {
    constexpr int kKeys = kKeysAtOnce<kHeads>;
    constexpr int kSums = kKeys * kHeads;
    Vec sum[kSums];
    PENGUIN_UNROLL
    for (int j = 0; j < kSums; j++) sum[j] = Vec{};
    int64_t at[kKeys];
    PENGUIN_UNROLL
    for (int j = 0; j < kKeys; j++) at[j] = (kWhole ? j : smaller(j, left - 1)) * size;
    for (int64_t d = 0; d < size; d += kWidth) {
        Vec query[kHeads];
        PENGUIN_UNROLL
        for (int h = 0; h < kHeads; h++) query[h] = load(q + h * size + d);
        PENGUIN_UNROLL
        for (int j = 0; j < kKeys; j++) {
            const Vec key = load(keys + at[j] + d);
            PENGUIN_UNROLL
            for (int h = 0; h < kHeads; h++) sum[h * kKeys + j] += key * query[h];
        }
    }
    alignas(64) float all[kSums];
    PENGUIN_UNROLL
    for (int j = 0; j < kSums; j += kWidth) store(all + j, sums<kWidth>(sum + j));
    PENGUIN_UNROLL
    for (int h = 0; h < kHeads; h++) {
        memcpy(scores + h * kTile, all + h * kKeys, static_cast<size_t>(kWhole ? kKeys : left) * sizeof(float));
    }
}

// out[h] = out[h] * factor[h] + the weighted sum of values, over kVectors vectors of each head's numbers.
template <int kHeads, int kVectors, class T>
inline void add_values(const float* weights, const float* factor, const T* values, int64_t count, int64_t size,
                       float* out) {
    Vec sum[kHeads][kVectors];
    PENGUIN_UNROLL
    for (int h = 0; h < kHeads; h++) {
        PENGUIN_UNROLL
        for (int c = 0; c < kVectors; c++) sum[h][c] = load(out + h * size + c * kWidth) * splat(factor[h]);
    }
    for (int64_t i = 0; i < count; i++) {
        const T* row = values + i * size;
        PENGUIN_UNROLL
        for (int c = 0; c < kVectors; c++) {
            const Vec value = load(row + c * kWidth);
            PENGUIN_UNROLL
            for (int h = 0; h < kHeads; h++) sum[h][c] += value * splat(weights[h * kTile + i]);
        }
    }
    PENGUIN_UNROLL
    for (int h = 0; h < kHeads; h++) {
        PENGUIN_UNROLL
        for (int c = 0; c < kVectors; c++) store(out + h * size + c * kWidth, sum[h][c]);
    }
}

// partial [kHeads, kPartialHeader + size] of kHeads queries [kHeads, size], scaled, over a span.
template <int kHeads, class T>
void decode_heads(const float* q, const Span<T>& span, int64_t size, float* partial) {
    constexpr int kKeys = kKeysAtOnce<kHeads>;
    constexpr int kVectors = kAccumulators / kHeads;
    alignas(64) float out[kHeads * kLargestHead];
    alignas(64) float scores[kHeads * kTile];
    memset(out, 0, sizeof(float) * static_cast<size_t>(kHeads * size));
    Row rows[kHeads];
    for (int64_t t = 0; t < span.count; t += kTile) {
        const int64_t count = smaller(kTile, span.count - t);
        const T* keys = span.keys + t * size;
        int64_t i = 0;
        for (; i + kKeys <= count; i += kKeys) {
            multiply_keys<kHeads, true>(q, keys + i * size, size, kKeys, scores + i);
        }
        if (i < count) multiply_keys<kHeads, false>(q, keys + i * size, size, count - i, scores + i);
        float factor[kHeads];
        for (int h = 0; h < kHeads; h++) {
            float* score = scores + h * kTile;
            if (span.key_scales) {
                for (i = 0; i < count; i++) score[i] *= span.key_scales[t + i];
            }
            factor[h] = weigh(score, count, rows[h]);
            if (span.value_scales) {
                for (i = 0; i < count; i++) score[i] *= span.value_scales[t + i];
            }
        }
        const T* values = span.values + t * size;
        for (i = 0; i < count; i += kValuesAtOnce) {
            const int64_t some = smaller(kValuesAtOnce, count - i);
            if (i > 0) {
                for (float& each : factor) each = 1.f;
            }
            int64_t d = 0;
            for (; d + kVectors * kWidth <= size; d += kVectors * kWidth) {
                add_values<kHeads, kVectors>(scores + i, factor, values + i * size + d, some, size, out + d);
            }
            for (; d < size; d += kWidth) {
                add_values<kHeads, 1>(scores + i, factor, values + i * size + d, some, size, out + d);
            }
        }
    }
    for (int h = 0; h < kHeads; h++) {
        float* to = partial + h * (kPartialHeader + size);
        to[0] = rows[h].top;
        to[1] = rows[h].sum;
        memcpy(to + kPartialHeader, out + h * size, static_cast<size_t>(size) * sizeof(float));
    }
}

template <class T>
void decode_span(const Attention& call, int64_t kv_head, int64_t begin, int64_t end, float* partial) {
    const int64_t group = call.heads / call.kv_heads, row = call.rows - 1;
    const Span<T> span = span_of<T>(call, kv_head, begin, end);
    alignas(64) float q[4 * kLargestHead];
    for (int64_t g = 0; g < group;) {
        const int64_t heads = group - g >= 4 ? 4 : group - g >= 2 ? 2 : 1;
        for (int64_t h = 0; h < heads; h++) {
            const float* from = call.q + (row * call.heads + kv_head * group + g + h) * call.size;
            place(call, row, from, q + h * call.size, call.scale * kLog2E);
        }
        float* to = partial + g * (kPartialHeader + call.size);
        if (heads == 4) {
            decode_heads<4>(q, span, call.size, to);
        } else if (heads == 2) {
            decode_heads<2>(q, span, call.size, to);
        } else {
            decode_heads<1>(q, span, call.size, to);
        }
        g += heads;
    }
}

inline void decode(const Attention& call, int64_t kv_head, int64_t begin, int64_t end, float* partial) {
    switch (call.type) {
        case CacheType::f32:
            return decode_span<float>(call, kv_head, begin, end, partial);
        case CacheType::f16:
            return decode_span<HalfBits>(call, kv_head, begin, end, partial);
        case CacheType::i8:
            return decode_span<int8_t>(call, kv_head, begin, end, partial);
    }
}

}  // namespace
}  // namespace penguin
