// The attention against double precision: shapes, lengths, groups, head sizes, every cache and instruction set.
#include <algorithm>

#include "problem.h"
#include "testing.h"

namespace penguin {
namespace {

constexpr double kTolerance = 4e-7;

void check_parity(const Shape& shape, unsigned seed, float spread = 1.f) {
    for (const Isa isa : isas_here()) {
        for (const CacheType type : kTypes) {
            Problem problem(shape, type, seed, spread);
            const Status status = problem.run(isa);
            CHECK_WHERE(status.ok(), status.sentence());
            const double error = error_of(problem.call());
            CHECK_WHERE(error <= kTolerance, text(shape, type, isa) + " error " + std::to_string(error * 1e6) + " e-6");
        }
    }
}

TEST(random_shapes) {
    std::mt19937 random(7);
    const auto pick = [&](unsigned least, unsigned most) {
        return static_cast<std::int64_t>(least + random() % (most - least + 1));
    };
    for (unsigned i = 0; i < 60; i++) {
        Shape shape;
        shape.kv_heads = pick(1, 3);
        shape.heads = shape.kv_heads * pick(1, 7);
        shape.size = 8 * pick(4, 32);
        shape.rows = random() % 2 ? 1 : pick(2, 40);
        shape.start = pick(0, 200);
        shape.spare = pick(0, 2);
        check_parity(shape, i);
    }
}

TEST(lengths_around_tiles_and_splits) {
    for (const std::int64_t slots : {1, 63, 64, 65, 511, 512, 513, 1024, 1100}) {
        check_parity({.rows = 1, .start = slots - 1, .heads = 2, .kv_heads = 1, .size = 32, .spare = 0}, 1);
        check_parity({.rows = std::min<std::int64_t>(slots, 5),
                      .start = std::max<std::int64_t>(slots - 5, 0),
                      .heads = 3,
                      .kv_heads = 1,
                      .size = 48,
                      .spare = 1},
                     2);
    }
}

TEST(long_prompts) {
    check_parity({.rows = 128, .start = 0, .heads = 4, .kv_heads = 2, .size = 128}, 3);
    check_parity({.rows = 131, .start = 77, .heads = 4, .kv_heads = 2, .size = 64}, 4);
    check_parity({.rows = 300, .start = 1, .heads = 2, .kv_heads = 2, .size = 40}, 5);
}

TEST(small_and_large_numbers) {
    for (const std::int64_t rows : {1, 9}) {
        const Shape shape{.rows = rows, .start = 90, .heads = 4, .kv_heads = 2, .size = 72};
        check_parity(shape, 6, 30.f);    // one key takes it all
        check_parity(shape, 7, 1e-3f);   // all keys alike
        check_parity(shape, 8, 1e-39f);  // denormals: zeros in float16 and int8
        check_parity(shape, 9, 0.f);
    }
}

TEST(a_scale_of_its_own) {
    for (const Isa isa : isas_here()) {
        for (const std::int64_t rows : {1, 6}) {
            Problem problem({.rows = rows, .start = 20}, CacheType::f32, 11);
            Attention call = problem.call();
            call.scale = 0.37f;
            CHECK(kv_attention(call, kernels_of(isa, call.size), serial()).ok());
            CHECK(error_of(call) <= kTolerance);
            const std::vector<float> with = problem.out;
            CHECK(problem.run(isa).ok() && problem.out != with);
        }
    }
}

TEST(huge_keys_of_both_signs) {
    for (const Isa isa : isas_here()) {
        for (const CacheType type : {CacheType::f32, CacheType::i8}) {
            for (const std::int64_t rows : {1, 7}) {
                Problem problem({.rows = rows, .start = 70}, type, 12);
                for (std::size_t i = 0; i < problem.k.size(); i++) problem.k[i] *= (i % 3 ? 1e15f : -1e15f);
                CHECK(problem.run(isa).ok());
                CHECK_WHERE(error_of(problem.call()) <= kTolerance, text(problem.shape, type, isa));
            }
        }
    }
}

// A prompt, and the same rows one after another, are one thing.
TEST(rows_one_by_one_equal_a_prompt) {
    for (const Isa isa : isas_here()) {
        for (const CacheType type : kTypes) {
            const Shape shape{.rows = 40, .start = 0, .heads = 6, .kv_heads = 2, .size = 64, .spare = 0};
            Problem whole(shape, type, 13), single(shape, type, 13);
            CHECK(whole.run(isa).ok());
            for (std::int64_t row = 0; row < shape.rows; row++) {
                Attention call = single.call();
                call.q += row * shape.heads * shape.size, call.out += row * shape.heads * shape.size;
                call.k += row * shape.kv_heads * shape.size, call.v += row * shape.kv_heads * shape.size;
                call.positions += row, call.start = row, call.rows = 1;
                CHECK(kv_attention(call, kernels_of(isa, shape.size), serial()).ok());
            }
            CHECK(whole.keys == single.keys && whole.values == single.values);
            CHECK(whole.key_scales == single.key_scales && whole.value_scales == single.value_scales);
            float worst = 0;
            for (std::size_t i = 0; i < whole.out.size(); i++) {
                const float difference = std::fabs(whole.out[i] - single.out[i]);
                if (!(difference <= worst)) worst = difference;
            }
            CHECK_WHERE(worst <= 3e-6f, text(shape, type, isa));
        }
    }
}

}  // namespace
}  // namespace penguin

int main(int argc, char** argv) { return testing::run(argc, argv); }
