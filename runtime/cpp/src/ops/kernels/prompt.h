// Many new rows: each tile of keys is transposed once and each tile of values widened once, for a block of rows.
//
// A row of this file is one query head of one token: row = token * group + head in its group.
#pragma once

#include "decode.h"

namespace penguin {
namespace {

constexpr int kColumnsAtOnce = kVectorsAtOnce * kWidth;
static_assert(kTile % kColumnsAtOnce == 0);

inline int64_t whole_blocks(int64_t rows) { return (rows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce; }

// Scratch memory of a block of rows; each part is a multiple of 64 bytes.
struct Block {
    float* q;       // [rows, size], turned and scaled
    float* out;     // [rows, size]
    float* keys;    // [size, kTile]
    float* values;  // [kTile, size]
    float* scores;  // [kRowsAtOnce, kTile]
    Row* state;     // [rows]

    Block(float* scratch, int64_t rows, int64_t size)
        : q(scratch),
          out(q + rows * size),
          keys(out + rows * size),
          values(keys + size * kTile),
          scores(values + kTile * size),
          state(reinterpret_cast<Row*>(scores + kRowsAtOnce * kTile)) {}
};

inline size_t prompt_scratch(int64_t rows, int64_t size) {
    const int64_t all = whole_blocks(rows);
    const int64_t floats = 2 * all * size + 2 * size * kTile + kRowsAtOnce * kTile;
    return static_cast<size_t>(floats) + static_cast<size_t>(all) * sizeof(Row) / sizeof(float);
}

// Keys [count, size] to [size, kTile], times their scales; positions from `count` on are 0.
template <class T>
inline void transpose_keys(const T* keys, const float* scales, int64_t count, int64_t size, float* to) {
    for (int64_t t = 0; t < kTile; t += kWidth) {
        for (int64_t d = 0; d < size; d += kWidth) {
            Vec x[kWidth];
            for (int j = 0; j < kWidth; j++) {
                if (t + j < count) {
                    x[j] = load(keys + (t + j) * size + d);
                    if (scales) x[j] *= splat(scales[t + j]);
                } else {
                    x[j] = Vec{};
                }
            }
            transpose(x);
            PENGUIN_UNROLL
            for (int j = 0; j < kWidth; j++) store(to + (d + j) * kTile + t, x[j]);
        }
    }
}

// Values [count, size] as float32, times their scales. What is float32 already stays where it is.
inline const float* widen_values(const float* values, const float*, int64_t, int64_t, float*) { return values; }

template <class T>
inline const float* widen_values(const T* values, const float* scales, int64_t count, int64_t size, float* to) {
    for (int64_t t = 0; t < count; t++) {
        const Vec scale = splat(scales ? scales[t] : 1.f);
        for (int64_t d = 0; d < size; d += kWidth) store(to + t * size + d, load(values + t * size + d) * scale);
    }
    return to;
}

// scores [kRowsAtOnce, kTile] of kColumnsAtOnce positions.
inline void multiply_block(const float* q, const float* keys, int64_t size, float* scores) {
    Vec sum[kRowsAtOnce][kVectorsAtOnce];
    PENGUIN_UNROLL
    for (int r = 0; r < kRowsAtOnce; r++) {
        PENGUIN_UNROLL
        for (int c = 0; c < kVectorsAtOnce; c++) sum[r][c] = Vec{};
    }
    for (int64_t d = 0; d < size; d++) {
        Vec key[kVectorsAtOnce];
        PENGUIN_UNROLL
        for (int c = 0; c < kVectorsAtOnce; c++) key[c] = load(keys + d * kTile + c * kWidth);
        PENGUIN_UNROLL
        for (int r = 0; r < kRowsAtOnce; r++) {
            const Vec query = splat(q[r * size + d]);
            PENGUIN_UNROLL
            for (int c = 0; c < kVectorsAtOnce; c++) sum[r][c] += key[c] * query;
        }
    }
    PENGUIN_UNROLL
    for (int r = 0; r < kRowsAtOnce; r++) {
        PENGUIN_UNROLL
        for (int c = 0; c < kVectorsAtOnce; c++) store(scores + r * kTile + c * kWidth, sum[r][c]);
    }
}

// out = out * factor + weights times values, kVectors vectors of each row's numbers.
template <int kVectors>
inline void add_block(const float* weights, const float* factor, const float* values, int64_t count, int64_t size,
                      float* out) {
    Vec sum[kRowsAtOnce][kVectors];
    PENGUIN_UNROLL
    for (int r = 0; r < kRowsAtOnce; r++) {
        PENGUIN_UNROLL
        for (int c = 0; c < kVectors; c++) sum[r][c] = load(out + r * size + c * kWidth) * splat(factor[r]);
    }
    for (int64_t t = 0; t < count; t++) {
        Vec value[kVectors];
        PENGUIN_UNROLL
        for (int c = 0; c < kVectors; c++) value[c] = load(values + t * size + c * kWidth);
        PENGUIN_UNROLL
        for (int r = 0; r < kRowsAtOnce; r++) {
            const Vec weight = splat(weights[r * kTile + t]);
            PENGUIN_UNROLL
            for (int c = 0; c < kVectors; c++) sum[r][c] += value[c] * weight;
        }
    }
    PENGUIN_UNROLL
    for (int r = 0; r < kRowsAtOnce; r++) {
        PENGUIN_UNROLL
        for (int c = 0; c < kVectors; c++) store(out + r * size + c * kWidth, sum[r][c]);
    }
}

template <class T>
void prompt_rows(const Attention& call, int64_t kv_head, int64_t first, int64_t last, float* scratch) {
    const int64_t group = call.heads / call.kv_heads, size = call.size;
    const int64_t rows = last - first, all = whole_blocks(rows);
    const Block block(scratch, all, size);
    // Rows that fill up the last block repeat the last row; nothing reads their results.
    const auto token_of = [&](int64_t r) { return (first + smaller(r, rows - 1)) / group; };
    const auto head_of = [&](int64_t r) {
        const int64_t row = first + smaller(r, rows - 1);
        return ((row / group) * call.heads + kv_head * group + row % group) * size;
    };
    for (int64_t r = 0; r < all; r++) {
        place(call, token_of(r), call.q + head_of(r), block.q + r * size, call.scale * kLog2E);
        block.state[r] = Row{};
    }
    memset(block.out, 0, sizeof(float) * static_cast<size_t>(all * size));

    const int64_t slots = call.start + token_of(rows - 1) + 1;
    const Span<T> span = span_of<T>(call, kv_head, 0, slots);
    for (int64_t t = 0; t < slots; t += kTile) {
        const int64_t count = smaller(kTile, slots - t);
        const float* value_scales = span.value_scales ? span.value_scales + t : nullptr;
        transpose_keys(span.keys + t * size, span.key_scales ? span.key_scales + t : nullptr, count, size, block.keys);
        const float* values = widen_values(span.values + t * size, value_scales, count, size, block.values);
        for (int64_t r = 0; r < all; r += kRowsAtOnce) {
            // Slots of this tile that the last row of these sees; the rows are in the order of their tokens.
            const int64_t seen = smaller(call.start + token_of(r + kRowsAtOnce - 1) + 1 - t, count);
            if (seen <= 0) continue;
            for (int64_t i = 0; i < kTile; i += kColumnsAtOnce) {
                multiply_block(block.q + r * size, block.keys + i, size, block.scores + i);
            }
            float factor[kRowsAtOnce];
            for (int64_t e = 0; e < kRowsAtOnce; e++) {
                const int64_t end = smaller(call.start + token_of(r + e) + 1 - t, count);
                factor[e] = weigh(block.scores + e * kTile, end > 0 ? end : 0, block.state[r + e]);
            }
            float* out = block.out + r * size;
            int64_t d = 0;
            for (; d + kColumnsAtOnce <= size; d += kColumnsAtOnce) {
                add_block<kVectorsAtOnce>(block.scores, factor, values + d, seen, size, out + d);
            }
            for (; d < size; d += kWidth) add_block<1>(block.scores, factor, values + d, seen, size, out + d);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const float inverse = 1.f / block.state[r].sum;
        float* to = call.out + head_of(r);
        for (int64_t d = 0; d < size; d++) to[d] = block.out[r * size + d] * inverse;
    }
}

inline void prompt(const Attention& call, int64_t kv_head, int64_t first, int64_t last, float* scratch) {
    switch (call.type) {
        case CacheType::f32:
            return prompt_rows<float>(call, kv_head, first, last, scratch);
        case CacheType::f16:
            return prompt_rows<HalfBits>(call, kv_head, first, last, scratch);
        case CacheType::i8:
            return prompt_rows<int8_t>(call, kv_head, first, last, scratch);
    }
}

constexpr Kernels kKernels{kWidth, append, decode, prompt, prompt_scratch};

}  // namespace
}  // namespace penguin
