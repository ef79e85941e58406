// A call of the attention with random content in buffers of exactly the size that it needs, and its result in double
// precision. Whatever the call must not read is NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "kernels/kernels.h"

namespace penguin {

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

constexpr CacheType kTypes[] = {CacheType::f32, CacheType::f16, CacheType::i8};

inline std::vector<Isa> isas_here() {
    std::vector<Isa> here;
    for (const Isa isa : kIsas) {
        if (supported(isa)) here.push_back(isa);
    }
    return here;
}

struct Shape {
    std::int64_t rows = 1, start = 0, heads = 4, kv_heads = 2, size = 64, spare = 3;
};

inline std::string text(const Shape& s, CacheType type, Isa isa) {
    return "rows " + std::to_string(s.rows) + " start " + std::to_string(s.start) + " heads " +
           std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " size " + std::to_string(s.size) + " cache " +
           (type == CacheType::f32   ? "f32"
            : type == CacheType::f16 ? "f16"
                                     : "int8") +
           " isa " + name_of(isa);
}

inline std::size_t width_of(CacheType type) { return type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1; }

// One cached number.
inline double number(const Attention& a, const void* cache, const float* scales, std::int64_t slot, std::int64_t d) {
    const auto at = static_cast<std::size_t>(slot * a.size + d);
    switch (a.type) {
        case CacheType::f32:
            return static_cast<double>(static_cast<const float*>(cache)[at]);
        case CacheType::f16: {
            Half x;
            std::memcpy(&x, static_cast<const unsigned char*>(cache) + 2 * at, sizeof x);
            return static_cast<double>(static_cast<float>(x));
        }
        case CacheType::i8:
            return static_cast<double>(static_cast<const std::int8_t*>(cache)[at]) *
                   static_cast<double>(scales[static_cast<std::size_t>(slot)]);
    }
    return std::numeric_limits<double>::quiet_NaN();
}

struct Problem {
    Shape shape;
    CacheType type;
    std::int64_t capacity, table_rows;
    std::vector<float> q, k, v, key_scales, value_scales, cos, sin, out;
    std::vector<unsigned char> keys, values;
    std::vector<std::int64_t> positions;

    Problem(const Shape& of, CacheType cache, unsigned seed, float spread = 1.f)
        : shape(of), type(cache), capacity(of.start + of.rows + of.spare), table_rows(capacity + 40) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.f, spread);
        const auto fill = [&](std::vector<float>& x, std::int64_t count) {
            x.resize(static_cast<std::size_t>(count));
            for (float& each : x) each = normal(random);
        };
        fill(q, shape.rows * shape.heads * shape.size);
        fill(k, shape.rows * shape.kv_heads * shape.size);
        fill(v, shape.rows * shape.kv_heads * shape.size);
        for (std::int64_t i = 0; i < shape.rows; i++) {
            positions.push_back(static_cast<std::int64_t>(random() % static_cast<unsigned>(table_rows)));
        }
        const std::int64_t half = shape.size / 2;
        for (std::int64_t i = 0; i < table_rows * half; i++) {
            const double angle = static_cast<double>(i / half) *
                                 std::pow(1e4, -static_cast<double>(i % half) / static_cast<double>(half));
            cos.push_back(static_cast<float>(std::cos(angle)));
            sin.push_back(static_cast<float>(std::sin(angle)));
        }
        const float nan = std::numeric_limits<float>::quiet_NaN();
        out.assign(q.size(), nan);
        const auto slots = static_cast<std::size_t>(shape.kv_heads * capacity);
        if (type == CacheType::i8) key_scales.assign(slots, nan), value_scales.assign(slots, nan);
        // All bits set: NaN as float32 and float16.
        keys.assign(slots * static_cast<std::size_t>(shape.size) * width_of(type), 0xff);
        values = keys;
        for (std::int64_t h = 0; h < shape.kv_heads; h++) {
            for (std::int64_t t = 0; t < shape.start; t++) {
                const std::int64_t slot = h * capacity + t;
                if (type == CacheType::i8) {
                    key_scales[static_cast<std::size_t>(slot)] = 0.01f * spread + 0.02f * std::fabs(normal(random));
                    value_scales[static_cast<std::size_t>(slot)] = spread * 0.02f;
                }
                for (std::int64_t d = 0; d < shape.size; d++) {
                    put(keys, slot * shape.size + d, normal(random), random());
                    put(values, slot * shape.size + d, normal(random), random());
                }
            }
        }
    }

    void put(std::vector<unsigned char>& cache, std::int64_t at, float x, std::mt19937::result_type bits) const {
        unsigned char* to = cache.data() + static_cast<std::size_t>(at) * width_of(type);
        const Half half = static_cast<Half>(x);
        if (type == CacheType::f32) std::memcpy(to, &x, 4);
        if (type == CacheType::f16) std::memcpy(to, &half, 2);
        if (type == CacheType::i8) *to = static_cast<unsigned char>(static_cast<int>(bits % 255) - 127);
    }

    Attention call() {
        Attention a;
        a.q = q.data(), a.k = k.data(), a.v = v.data();
        a.keys = keys.data(), a.values = values.data();
        if (type == CacheType::i8) a.key_scales = key_scales.data(), a.value_scales = value_scales.data();
        a.positions = positions.data(), a.cos = cos.data(), a.sin = sin.data(), a.out = out.data();
        a.rows = shape.rows, a.start = shape.start, a.heads = shape.heads, a.kv_heads = shape.kv_heads;
        a.size = shape.size, a.capacity = capacity, a.table_rows = table_rows, a.type = type;
        return a;
    }

    Status run(Isa isa, const ParallelFor& parallel = serial()) {
        return kv_attention(call(), kernels_of(isa, shape.size), parallel);
    }
};

// A head turned to its position.
inline std::vector<double> turned(const Attention& a, const float* x, std::int64_t row) {
    const std::int64_t half = a.size / 2;
    std::vector<double> y(static_cast<std::size_t>(a.size));
    for (std::int64_t i = 0; i < half; i++) {
        const double c = static_cast<double>(a.cos[a.positions[row] * half + i]);
        const double s = static_cast<double>(a.sin[a.positions[row] * half + i]);
        const double first = static_cast<double>(x[i]), second = static_cast<double>(x[i + half]);
        y[static_cast<std::size_t>(i)] = first * c - second * s;
        y[static_cast<std::size_t>(i + half)] = second * c + first * s;
    }
    return y;
}

// The largest difference of `a.out` from the result in double precision over the caches as they are now, relative to
// the largest value and to what rounding a score costs: below 4 e-6 is what float32 allows. NaN: something was NaN.
inline double error_of(const Attention& a) {
    double worst = 0;
    const double scale = a.scale > 0 ? static_cast<double>(a.scale) : 1 / std::sqrt(static_cast<double>(a.size));
    const std::int64_t group = a.heads / a.kv_heads;
    for (std::int64_t row = 0; row < a.rows; row++) {
        // A long prompt is looked at in some of its rows, those at its ends among them.
        if (a.rows > 24 && row > 2 && row < a.rows - 3 && row % 17) continue;
        for (std::int64_t head = 0; head < a.heads; head++) {
            const std::int64_t slots = a.start + row + 1, first = (head / group) * a.capacity;
            const std::int64_t at = (row * a.heads + head) * a.size;
            const std::vector<double> query = turned(a, a.q + at, row);
            std::vector<double> weight(static_cast<std::size_t>(slots));
            double top = -std::numeric_limits<double>::infinity(), largest = 0, size = 0, sum = 0;
            for (std::int64_t t = 0; t < slots; t++) {
                double score = 0, terms = 0;
                for (std::int64_t d = 0; d < a.size; d++) {
                    const double term =
                        query[static_cast<std::size_t>(d)] * number(a, a.keys, a.key_scales, first + t, d);
                    score += term, terms += std::fabs(term);
                }
                weight[static_cast<std::size_t>(t)] = score * scale;
                top = std::fmax(top, score * scale), size = std::fmax(size, terms * scale);
            }
            std::vector<double> result(static_cast<std::size_t>(a.size));
            for (std::int64_t t = 0; t < slots; t++) {
                const double w = std::exp(weight[static_cast<std::size_t>(t)] - top);
                sum += w;
                for (std::int64_t d = 0; d < a.size; d++) {
                    const double x = number(a, a.values, a.value_scales, first + t, d);
                    result[static_cast<std::size_t>(d)] += w * x, largest = std::fmax(largest, std::fabs(x));
                }
            }
            for (std::int64_t d = 0; d < a.size; d++) {
                const double difference =
                    std::fabs(result[static_cast<std::size_t>(d)] / sum - static_cast<double>(a.out[at + d]));
                const double error = difference / (std::fmax(largest, 1e-30) * (1 + size));
                if (!(error <= worst)) worst = error;
            }
        }
    }
    return worst;
}

}  // namespace penguin
