// What one instruction set offers; the sources beside this file are compiled once for each.
//
// Kernel sources use no function of the standard library but those of C. An inline function compiled for AVX-512 could
// otherwise be the copy that the linker keeps for all, and stop an older processor (`kernel_symbols` in the tests).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../attention.h"

namespace penguin {

// One query head over one split of the positions: [maximum of the scores, sum of the weights, size weighted sums].
// Scores are in units of log 2; a head's values are the sums over the splits, each times 2^(maximum - the largest).
constexpr std::int64_t kPartialHeader = 2;

struct Kernels {
    // Head sizes are multiples of this.
    std::int64_t width;
    // Rotates, converts and stores the new keys and values of one KV head: rows [first, last).
    void (*append)(const Attention& call, std::int64_t kv_head, std::int64_t first, std::int64_t last);
    // The last row over slots [begin, end), for the query heads of one KV head; partial [heads / kv_heads, 2 + size].
    void (*decode)(const Attention& call, std::int64_t kv_head, std::int64_t begin, std::int64_t end, float* partial);
    // Rows [first, last) of the rows * group (row = token * group + head in its group) of one KV head, over all slots.
    void (*prompt)(const Attention& call, std::int64_t kv_head, std::int64_t first, std::int64_t last, float* scratch);
    // How many floats `prompt` needs for so many rows, 64-byte aligned.
    std::size_t (*prompt_scratch)(std::int64_t rows, std::int64_t size);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace penguin
