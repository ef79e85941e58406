// Results that are equal bit for bit whatever threads there are, and calls from several threads at one time.
#include <atomic>
#include <thread>

#include "problem.h"
#include "testing.h"

namespace penguin {
namespace {

// So many threads, which take the tasks from the last to the first.
struct Team {
    explicit Team(int of) : threads(of) {}
    int threads;
    std::atomic<int> calls = 0;

    ParallelFor parallel() {
        return {[](void* context, std::size_t count, ParallelFor::Task task, void* data) {
                    Team& team = *static_cast<Team*>(context);
                    team.calls++;
                    std::atomic<std::size_t> left = count;
                    const auto work = [&] {
                        for (std::size_t i = left; i > 0;) {
                            if (left.compare_exchange_weak(i, i - 1)) task(data, i - 1), i = left;
                        }
                    };
                    std::vector<std::thread> helpers;
                    for (int i = 1; i < team.threads; i++) helpers.emplace_back(work);
                    work();
                    for (std::thread& helper : helpers) helper.join();
                    return Status();
                },
                this};
    }
};

const Shape kShapes[] = {{.rows = 1, .start = 2100, .heads = 4, .kv_heads = 1, .size = 64},
                         {.rows = 1, .start = 1023, .heads = 6, .kv_heads = 3, .size = 128},
                         {.rows = 150, .start = 33, .heads = 4, .kv_heads = 2, .size = 64},
                         {.rows = 7, .start = 700, .heads = 8, .kv_heads = 2, .size = 80}};

TEST(bits_do_not_depend_on_the_number_of_threads) {
    for (const Isa isa : isas_here()) {
        for (const CacheType type : kTypes) {
            for (const Shape& shape : kShapes) {
                Problem alone(shape, type, 41);
                CHECK(alone.run(isa).ok());
                for (int threads = 1; threads <= 5; threads++) {
                    Problem shared(shape, type, 41);
                    Team team(threads);
                    CHECK(shared.run(isa, team.parallel()).ok());
                    const std::string where = text(shape, type, isa) + " threads " + std::to_string(threads);
                    CHECK_WHERE(team.calls > 0, where);
                    CHECK_WHERE(shared.out == alone.out, where);
                    CHECK_WHERE(shared.keys == alone.keys && shared.values == alone.values, where);
                }
            }
        }
    }
}

TEST(small_work_stays_on_its_thread) {
    Problem problem({.rows = 1, .start = 30, .heads = 4, .kv_heads = 2, .size = 64}, CacheType::f32, 42);
    Team team(3);
    CHECK(problem.run(Isa::portable, team.parallel()).ok());
    CHECK(team.calls == 0);
}

TEST(calls_at_one_time) {
    std::vector<std::thread> callers;
    std::atomic<int> wrong = 0;
    for (unsigned caller = 0; caller < 4; caller++) {
        callers.emplace_back([caller, &wrong] {
            for (const Shape& shape : kShapes) {
                const CacheType type = kTypes[caller % 3];
                const Isa isa = isas_here().back();
                Problem first(shape, type, caller), second(shape, type, caller);
                Team team(2);
                if (!first.run(isa).ok() || !second.run(isa, team.parallel()).ok() || first.out != second.out) wrong++;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK(wrong == 0);
}

}  // namespace
}  // namespace penguin

int main(int argc, char** argv) { return testing::run(argc, argv); }
