// Vectors of float for the instruction set that this file is compiled for (GCC and Clang vector extensions).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>  // index_sequence alone, a type

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__clang__)
#define PENGUIN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PENGUIN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace penguin {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kAccumulators = 16;  // of decode: with what they are multiplied by they fill the registers
constexpr int kRowsAtOnce = 6;     // of prompt
constexpr int kVectorsAtOnce = 4;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kAccumulators = 8;
constexpr int kRowsAtOnce = 6;
constexpr int kVectorsAtOnce = 2;
#else
constexpr int kWidth = 4;
constexpr int kAccumulators = 8;
constexpr int kRowsAtOnce = 4;
constexpr int kVectorsAtOnce = 4;
#endif

using Vec = float __attribute__((vector_size(kWidth * 4)));
using IntVec = int32_t __attribute__((vector_size(kWidth * 4)));
// In memory, at any address that a float may have. A typedef, because Clang drops the alignment of a using.
typedef float VecInMemory __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

// A float16 as it lies in a cache.
struct HalfBits {
    uint16_t bits;
};

inline Vec load(const float* p) { return *reinterpret_cast<const VecInMemory*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<VecInMemory*>(p) = x; }
inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
    int32_t four;  // GCC 12 would convert a vector of four bytes one by one
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
#else
    typedef int8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Vec);
#endif
}

inline Vec load(const HalfBits* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
    return vcvt_f32_f16(vld1_f16(reinterpret_cast<const Half*>(p)));
#else
    // Without an instruction for it: move exponent and mantissa into place, multiply the exponent right.
    typedef uint16_t Words __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));
    const IntVec bits = __builtin_convertvector(*reinterpret_cast<const Words*>(p), IntVec);
    const Vec magnitude = (Vec)((bits & 0x7fff) << 13) * splat(0x1p112f);
    const IntVec special = (magnitude >= splat(0x1p16f)) & 0x7f800000;  // infinity and NaN
    return (Vec)((IntVec)magnitude | special | ((bits & 0x8000) << 16));
#endif
}

inline void store_half(HalfBits* p, Vec x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    vst1_f16(reinterpret_cast<Half*>(p), vcvt_f16_f32(x));
#else
    for (int i = 0; i < kWidth; i++) {
        const Half y = static_cast<Half>(x[i]);
        memcpy(p + i, &y, sizeof y);
    }
#endif
}

// The larger of each pair; `b` where one of them is NaN.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float largest(Vec x) {
    float top = x[0];
    for (int i = 1; i < kWidth; i++) top = x[i] > top ? x[i] : top;
    return top;
}

inline float sum_of(Vec x) {
    float sum = 0;
    for (int i = 0; i < kWidth; i++) sum += x[i];
    return sum;
}

// Nearest integers, halves to even, of numbers within +-2^22; NaN stays NaN.
inline Vec rounded(Vec x) {
#if defined(__AVX512F__)
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Vec magic = splat(0x1.8p23f);
    return (x + magic) - magic;
#endif
}

// 2^x for x <= 0 with a relative error of about 2e-7; 0 below 2^-126; NaN for NaN.
inline Vec exp2_of(Vec x) {
    const Vec least = splat(-126.f);
    const Vec clamped = x < least ? least : x;
    const Vec whole = rounded(clamped);
    const Vec part = clamped - whole;
    Vec y = splat(1.535336188319500e-4f);
    y = y * part + 1.339887440266574e-3f;
    y = y * part + 9.618437357674640e-3f;
    y = y * part + 5.550332471162809e-2f;
    y = y * part + 2.402264791363012e-1f;
    y = y * part + 6.931472028550421e-1f;
    y = y * part + 1.0f;
    // The exponent by adding 127 to the whole part in its own mantissa, which is safe for NaN, too.
    const IntVec power = ((IntVec)(whole + splat(0x1.8p23f + 127.f))) << 23;
    return x < least ? Vec{} : y * (Vec)power;
}

template <size_t... I>
inline Vec low_interleaved(Vec a, Vec b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, static_cast<int>(I / 2 + (I % 2 ? kWidth : 0))...);
}

template <size_t... I>
inline Vec high_interleaved(Vec a, Vec b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, static_cast<int>(kWidth / 2 + I / 2 + (I % 2 ? kWidth : 0))...);
}

template <size_t... I>
inline Vec sums_of_pairs(Vec a, Vec b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, static_cast<int>(2 * I)...) +
           __builtin_shufflevector(a, b, static_cast<int>(2 * I + 1)...);
}

using Lanes = std::make_index_sequence<kWidth>;

// Lane i of the result is the sum of vector i of N; with N = kWidth.
template <int N>
inline Vec sums(const Vec* x) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        return sums_of_pairs(sums<N / 2>(x), sums<N / 2>(x + N / 2), Lanes{});
    }
}

// Lane j of vector i becomes lane i of vector j; the result is in `x`.
inline void transpose(Vec* x) {
    Vec other[kWidth];
    Vec* from = x;
    Vec* to = other;
    int rounds = 0;
    PENGUIN_UNROLL
    for (int step = 1; step < kWidth; step *= 2) {
        PENGUIN_UNROLL
        for (int j = 0; j < kWidth / 2; j++) {
            to[2 * j] = low_interleaved(from[j], from[j + kWidth / 2], Lanes{});
            to[2 * j + 1] = high_interleaved(from[j], from[j + kWidth / 2], Lanes{});
        }
        Vec* swap = from;
        from = to;
        to = swap;
        rounds++;
    }
    if (rounds % 2) {
        for (int j = 0; j < kWidth; j++) x[j] = other[j];
    }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace penguin
