// A tile of scores to weights, with the running maximum and sum of its row.
#pragma once

#include "vectors.h"

namespace penguin {
namespace {

constexpr int kTile = 64;  // positions
constexpr float kLog2E = 1.4426950408889634f;

// What one row of the softmax has seen so far.
struct Row {
    float top = -INFINITY;
    float sum = 0;
};

// Turns `scores` (units of log 2) of positions [0, count) of the tile into weights and sets the others to 0.
// Returns the factor for what was summed before. NaN among the scores makes the sum NaN.
inline float weigh(float* scores, int64_t count, Row& row) {
    for (int64_t i = count; i < kTile; i++) scores[i] = -INFINITY;
    Vec tops = load(scores);
    for (int i = kWidth; i < kTile; i += kWidth) tops = larger(tops, load(scores + i));
    const float here = largest(tops);
    float factor = 1.f;
    if (here > row.top) {
        factor = exp2f(row.top - here);
        row.top = here;
    }
    // Nothing but -infinity so far: any finite number in its place gives weights of 0.
    const Vec top = splat(row.top == -INFINITY ? 0.f : row.top);
    Vec sum{};
    for (int i = 0; i < kTile; i += kWidth) {
        const Vec weight = exp2_of(load(scores + i) - top);
        sum += weight;
        store(scores + i, weight);
    }
    row.sum = row.sum * factor + sum_of(sum);
    return factor;
}

}  // namespace
}  // namespace penguin
