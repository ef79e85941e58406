// What must never pass for a result: NaN, memory that is not filled, sizes and buffers that do not fit.
#include <functional>

#include "problem.h"
#include "testing.h"

namespace penguin {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// All numbers of one head of one row of the result are NaN; or none is.
bool all_nan(const Problem& problem, std::int64_t row, std::int64_t head) {
    const auto at = static_cast<std::size_t>((row * problem.shape.heads + head) * problem.shape.size);
    for (std::size_t d = 0; d < static_cast<std::size_t>(problem.shape.size); d++) {
        if (!std::isnan(problem.out[at + d])) return false;
    }
    return true;
}

bool none_nan(const Problem& problem, std::int64_t row, std::int64_t head) {
    const auto at = static_cast<std::size_t>((row * problem.shape.heads + head) * problem.shape.size);
    for (std::size_t d = 0; d < static_cast<std::size_t>(problem.shape.size); d++) {
        if (std::isnan(problem.out[at + d])) return false;
    }
    return true;
}

void for_each(const std::function<void(const Shape&, CacheType, Isa)>& body) {
    for (const Isa isa : isas_here()) {
        for (const CacheType type : kTypes) {
            body({.rows = 1, .start = 70, .heads = 4, .kv_heads = 2, .size = 64}, type, isa);
            body({.rows = 1, .start = 1200, .heads = 3, .kv_heads = 1, .size = 32}, type, isa);
            body({.rows = 20, .start = 60, .heads = 4, .kv_heads = 2, .size = 64}, type, isa);
        }
    }
}

TEST(nan_in_a_query_reaches_its_head_alone) {
    for_each([](const Shape& shape, CacheType type, Isa isa) {
        for (const float bad : {kNan, kInfinity}) {
            Problem problem(shape, type, 31);
            const std::int64_t row = shape.rows - 1, head = 1;
            problem.q[static_cast<std::size_t>((row * shape.heads + head) * shape.size + 5)] = bad;
            CHECK(problem.run(isa).ok());
            CHECK_WHERE(all_nan(problem, row, head), text(shape, type, isa));
            CHECK_WHERE(none_nan(problem, row, 0), text(shape, type, isa));
            CHECK_WHERE(none_nan(problem, 0, 2), text(shape, type, isa));
        }
    });
}

TEST(nan_in_a_key_or_value_reaches_what_attends_to_it) {
    for_each([](const Shape& shape, CacheType type, Isa isa) {
        for (const bool in_key : {true, false}) {
            Problem problem(shape, type, 32);
            const std::int64_t row = shape.rows / 2;
            std::vector<float>& where = in_key ? problem.k : problem.v;
            // KV head 0; all of its row, so that each number of the result meets it.
            for (std::int64_t d = 0; d < shape.size; d++) {
                where[static_cast<std::size_t>(row * shape.kv_heads * shape.size + d)] = kNan;
            }
            CHECK(problem.run(isa).ok());
            for (std::int64_t r = row; r < shape.rows; r++) CHECK_WHERE(all_nan(problem, r, 0), text(shape, type, isa));
            if (shape.kv_heads > 1)
                CHECK_WHERE(none_nan(problem, shape.rows - 1, shape.heads - 1), text(shape, type, isa));
            if (shape.rows > 12) CHECK_WHERE(none_nan(problem, 0, 0), text(shape, type, isa));
        }
    });
}

TEST(one_nan_of_an_int8_row_is_not_rounded_away) {
    for (const Isa isa : isas_here()) {
        for (const float bad : {kNan, kInfinity, -kInfinity}) {
            for (const bool in_key : {true, false}) {
                Problem problem({.rows = 1, .start = 9, .heads = 2, .kv_heads = 1, .size = 32}, CacheType::i8, 33);
                (in_key ? problem.k : problem.v)[17] = bad;
                CHECK(problem.run(isa).ok());
                CHECK(all_nan(problem, 0, 0) && all_nan(problem, 0, 1));
            }
        }
    }
}

// Buffers at each address that the type of their numbers allows. Caches are poisoned beyond what is filled, here as in
// every test.
TEST(any_address_that_the_type_allows) {
    for_each([](const Shape& shape, CacheType type, Isa isa) {
        Problem plain(shape, type, 34), moved(shape, type, 34);
        CHECK(plain.run(isa).ok());
        for (const std::size_t by : {std::size_t{1}, std::size_t{3}}) {
            const auto shift = [&](auto& buffer, std::size_t numbers) {
                buffer.insert(buffer.begin(), numbers, {});
                return buffer.data() + numbers;
            };
            Problem problem(shape, type, 34);
            Attention call = problem.call();
            call.q = shift(problem.q, by), call.k = shift(problem.k, by), call.v = shift(problem.v, by);
            call.keys = shift(problem.keys, by * width_of(type)),
            call.values = shift(problem.values, by * width_of(type));
            call.cos = shift(problem.cos, by), call.sin = shift(problem.sin, by), call.out = shift(problem.out, by);
            if (type == CacheType::i8) {
                call.key_scales = shift(problem.key_scales, by), call.value_scales = shift(problem.value_scales, by);
            }
            CHECK(kv_attention(call, kernels_of(isa, shape.size), serial()).ok());
            CHECK_WHERE(!std::memcmp(call.out, plain.out.data(), plain.out.size() * sizeof(float)),
                        text(shape, type, isa));
        }
    });
}

TEST(no_rows_change_nothing) {
    for (const CacheType type : kTypes) {
        Problem problem({.rows = 0, .start = 8, .spare = 0}, type, 35);
        const Problem before = problem;
        CHECK(problem.run(Isa::portable).ok());
        CHECK(problem.keys == before.keys && problem.values == before.values);
    }
    Problem empty({.rows = 0, .start = 0, .spare = 0}, CacheType::f32, 36);
    CHECK(empty.run(Isa::portable).ok());
}

// Refused with a sentence that holds `said`, and nothing written.
void refused(CacheType type, const char* said, const std::function<void(Problem&, Attention&)>& spoil) {
    Problem problem({.rows = 3, .start = 5, .heads = 4, .kv_heads = 2, .size = 64}, type, 37);
    Attention call = problem.call();
    spoil(problem, call);
    const Problem before = problem;
    const Status status = kv_attention(call, kernels_of(Isa::portable, 64), serial());
    CHECK_WHERE(!status.ok() && status.sentence().find(said) != std::string::npos, status.sentence());
    CHECK_WHERE(problem.keys == before.keys && problem.values == before.values, said);
    CHECK_WHERE(!std::memcmp(problem.out.data(), before.out.data(), before.out.size() * sizeof(float)), said);
}

TEST(what_does_not_fit_is_refused) {
    const CacheType f32 = CacheType::f32;
    refused(f32, "from slot -1", [](Problem&, Attention& a) { a.start = -1; });
    refused(f32, "from slot 9 on", [](Problem&, Attention& a) { a.start = 9; });
    refused(f32, "slots 0 to 10", [](Problem&, Attention& a) { a.start = std::numeric_limits<std::int64_t>::max(); });
    refused(f32, "got -2 rows", [](Problem&, Attention& a) { a.rows = -2; });
    refused(f32, "got 12 rows", [](Problem&, Attention& a) { a.rows = 12; });
    for (const std::int64_t size : {0, 24, 63, 68, 264, -64}) {
        refused(f32, ("heads of size " + std::to_string(size)).c_str(), [&](Problem&, Attention& a) { a.size = size; });
    }
    refused(f32, "4 query heads and 3 KV heads", [](Problem&, Attention& a) { a.kv_heads = 3; });
    refused(f32, "0 KV heads", [](Problem&, Attention& a) { a.kv_heads = 0; });
    refused(f32, "0 query heads", [](Problem&, Attention& a) { a.heads = 0; });
    refused(f32, "position 51 for row 2", [](Problem& p, Attention&) { p.positions[2] = 51; });
    refused(f32, "position -1 for row 0", [](Problem& p, Attention&) { p.positions[0] = -1; });
    refused(f32, "the scale", [](Problem&, Attention& a) { a.scale = -1; });
    refused(f32, "the scale", [](Problem&, Attention& a) { a.scale = kNan; });
    refused(f32, "the scale", [](Problem&, Attention& a) { a.scale = kInfinity; });
    refused(f32, "no buffer for q", [](Problem&, Attention& a) { a.q = nullptr; });
    refused(f32, "no buffer for out", [](Problem&, Attention& a) { a.out = nullptr; });
    refused(f32, "beside a cache that is not int8", [](Problem& p, Attention& a) { a.key_scales = p.sin.data(); });
    refused(f32, "one buffer for keys and values", [](Problem&, Attention& a) { a.values = a.keys; });
    refused(CacheType::i8, "no buffer for value_scales", [](Problem&, Attention& a) { a.value_scales = nullptr; });
    const auto odd = [](void* p) { return static_cast<void*>(static_cast<unsigned char*>(p) + 1); };
    refused(f32, "got keys at an address that 4", [&](Problem&, Attention& a) { a.keys = odd(a.keys); });
    refused(CacheType::f16, "got values at an address that 2",
            [&](Problem&, Attention& a) { a.values = odd(a.values); });
    refused(f32, "got out at an address", [&](Problem&, Attention& a) { a.out = static_cast<float*>(odd(a.out)); });
}

TEST(a_failure_of_the_threads_is_the_result) {
    Problem problem({.rows = 40, .start = 100, .size = 128}, CacheType::f32, 38);
    const ParallelFor broken{[](void*, std::size_t, ParallelFor::Task, void*) { return Status::error("no threads"); },
                             nullptr};
    CHECK(problem.run(Isa::portable, broken).sentence() == "no threads");
}

}  // namespace
}  // namespace penguin

int main(int argc, char** argv) { return testing::run(argc, argv); }
