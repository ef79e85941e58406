// What new rows become in the cache, against plain code; and that nothing else of the cache is touched.
#include "problem.h"
#include "testing.h"

namespace penguin {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The row of a cache at a slot as it is stored.
const unsigned char* stored(const Problem& problem, const std::vector<unsigned char>& cache, std::int64_t slot) {
    return cache.data() + static_cast<std::size_t>(slot * problem.shape.size) * width_of(problem.type);
}

void check_row(const Problem& problem, const std::vector<unsigned char>& cache, const std::vector<float>& scales,
               std::int64_t slot, const std::vector<double>& wanted, const std::string& where) {
    const unsigned char* bytes = stored(problem, cache, slot);
    double top = 0;
    for (const double x : wanted) top = std::fmax(top, std::fabs(x));
    const double scale =
        problem.type == CacheType::i8 ? static_cast<double>(scales[static_cast<std::size_t>(slot)]) : 0;
    if (problem.type == CacheType::i8) CHECK_WHERE(std::fabs(scale - top / 127) <= 1e-6 * top / 127, where);
    for (std::size_t d = 0; d < wanted.size(); d++) {
        if (problem.type == CacheType::f32) {
            float x;
            std::memcpy(&x, bytes + 4 * d, 4);
            CHECK_WHERE(std::fabs(static_cast<double>(x) - wanted[d]) <= 3e-7 * top, where);
        } else if (problem.type == CacheType::f16) {
            Half x;
            std::memcpy(&x, bytes + 2 * d, 2);
            const double error = std::fabs(static_cast<double>(static_cast<float>(x)) - wanted[d]);
            CHECK_WHERE(error <= std::fabs(wanted[d]) * 0x1p-11 + 3e-7 * top + 0x1p-25, where);
        } else {
            const double x = static_cast<double>(static_cast<std::int8_t>(bytes[d]));
            CHECK_WHERE(std::fabs(x - wanted[d] / scale) <= 0.5 + 1e-4, where);
        }
    }
}

TEST(rows_are_turned_and_rounded) {
    for (const Isa isa : isas_here()) {
        for (const CacheType type : kTypes) {
            for (const std::int64_t size : {32, 40, 128, 256}) {
                const Shape shape{.rows = 5, .start = 3, .heads = 2, .kv_heads = 2, .size = size, .spare = 4};
                Problem problem(shape, type, 21);
                const Problem before = problem;
                CHECK(problem.run(isa).ok());
                const Attention call = problem.call();
                for (std::int64_t h = 0; h < shape.kv_heads; h++) {
                    for (std::int64_t t = 0; t < problem.capacity; t++) {
                        const std::int64_t slot = h * problem.capacity + t, row = t - shape.start;
                        const std::string where = text(shape, type, isa) + " slot " + std::to_string(t);
                        if (row >= 0 && row < shape.rows) {
                            const std::int64_t at = (row * shape.kv_heads + h) * size;
                            std::vector<double> value(static_cast<std::size_t>(size));
                            for (std::size_t d = 0; d < value.size(); d++) {
                                value[d] = static_cast<double>(call.v[at + static_cast<std::int64_t>(d)]);
                            }
                            check_row(problem, problem.keys, problem.key_scales, slot, turned(call, call.k + at, row),
                                      where);
                            check_row(problem, problem.values, problem.value_scales, slot, value, where);
                            continue;
                        }
                        const std::size_t bytes = static_cast<std::size_t>(size) * width_of(type);
                        CHECK_WHERE(
                            !std::memcmp(stored(problem, problem.keys, slot), stored(before, before.keys, slot), bytes),
                            where);
                        CHECK_WHERE(!std::memcmp(stored(problem, problem.values, slot),
                                                 stored(before, before.values, slot), bytes),
                                    where);
                        if (type != CacheType::i8) continue;
                        const auto s = static_cast<std::size_t>(slot);
                        CHECK_WHERE(!std::memcmp(&problem.key_scales[s], &before.key_scales[s], 4), where);
                        CHECK_WHERE(!std::memcmp(&problem.value_scales[s], &before.value_scales[s], 4), where);
                    }
                }
            }
        }
    }
}

// The values of one row go through unturned: what they become is known exactly.
struct Stored {
    float scale;
    std::vector<int> bytes;
};

Stored int8_of(const std::vector<float>& row, Isa isa) {
    Problem problem({.rows = 1, .start = 0, .heads = 1, .kv_heads = 1, .size = static_cast<std::int64_t>(row.size())},
                    CacheType::i8, 22);
    problem.v = row;
    CHECK(problem.run(isa).ok());
    Stored result{problem.value_scales[0], {}};
    for (std::size_t d = 0; d < row.size(); d++) result.bytes.push_back(static_cast<std::int8_t>(problem.values[d]));
    return result;
}

TEST(int8_rounds_halves_to_even_within_127) {
    for (const Isa isa : isas_here()) {
        std::vector<float> row(32, 0.f);
        row[0] = -127.f, row[1] = 0.5f, row[2] = 1.5f, row[3] = 2.5f, row[4] = -2.5f, row[5] = 126.49f, row[31] = 127.f;
        const Stored stored = int8_of(row, isa);
        CHECK(stored.scale == 1.f);
        CHECK((std::vector<int>(stored.bytes.begin(), stored.bytes.begin() + 6) ==
               std::vector<int>{-127, 0, 2, 2, -2, 126}));
        CHECK(stored.bytes[31] == 127);
        std::mt19937 random(1);
        std::uniform_real_distribution<float> any(-3.f, 3.f);
        for (int i = 0; i < 200; i++) {
            for (float& x : row) x = any(random);
            const Stored many = int8_of(row, isa);
            int top = 0;
            for (std::size_t d = 0; d < row.size(); d++) {
                CHECK(many.bytes[d] == static_cast<int>(std::nearbyint(row[d] / many.scale)));
                top = std::max(top, std::abs(many.bytes[d]));
            }
            CHECK(top == 127);
        }
    }
}

TEST(int8_rows_without_a_scale) {
    for (const Isa isa : isas_here()) {
        const std::vector<int> zeros(32, 0);
        for (const float x : {0.f, -0.f, 1e-40f, 1e-37f}) {
            const Stored stored = int8_of(std::vector<float>(32, x), isa);
            CHECK(stored.scale == 0.f && stored.bytes == zeros);
        }
        CHECK(int8_of(std::vector<float>(32, 1e-35f), isa).bytes == std::vector<int>(32, 127));
        for (const float x : {kNan, -kNan, kInfinity, -kInfinity}) {
            for (const std::size_t at : {std::size_t{0}, std::size_t{13}, std::size_t{31}}) {
                std::vector<float> row(32, 1.f);
                row[at] = x;
                const Stored stored = int8_of(row, isa);
                CHECK(std::isnan(stored.scale) && stored.bytes == zeros);
            }
        }
    }
}

TEST(float16_rounds_to_nearest_and_overflows_to_infinity) {
    for (const Isa isa : isas_here()) {
        Problem problem({.rows = 1, .start = 0, .heads = 1, .kv_heads = 1, .size = 32}, CacheType::f16, 23);
        const float in[] = {65504.f,  65519.f,        65520.f,          -1e9f, 0x1p-24f,
                            0x1p-26f, 1.f + 0x1p-11f, 1.f + 0x1.8p-10f, -0.f};
        const float out[] = {65504.f, 65504.f, kInfinity, -kInfinity, 0x1p-24f, 0.f, 1.f, 1.f + 0x1p-9f, -0.f};
        for (std::size_t i = 0; i < std::size(in); i++) problem.v[i] = in[i];
        CHECK(problem.run(isa).ok());
        for (std::size_t i = 0; i < std::size(in); i++) {
            Half x;
            std::memcpy(&x, problem.values.data() + 2 * i, 2);
            CHECK_WHERE(static_cast<float>(x) == out[i], std::to_string(in[i]));
        }
    }
}

}  // namespace
}  // namespace penguin

int main(int argc, char** argv) { return testing::run(argc, argv); }
