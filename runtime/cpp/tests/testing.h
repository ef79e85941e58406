// A test is TEST(name) { ... CHECK(condition) ... }. A file of tests is a program: with an argument, it runs the tests
// whose names contain it. The exit code is 1 when a check failed, or when no test ran.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace testing {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline int& failures() {
    static int count = 0;
    return count;
}

struct Registered {
    Registered(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline void check(bool good, const char* file, int line, const std::string& what) {
    if (good) return;
    if (++failures() <= 20) std::printf("%s:%d: %s\n", file, line, what.c_str());
}

inline int run(int argc, char** argv) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was said before a crash is seen
    int ran = 0;
    for (const Test& test : tests()) {
        if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
        const int before = failures();
        test.body();
        ran++;
        std::printf("%s %s\n", failures() == before ? "ok    " : "FAILED", test.name);
    }
    std::printf("%d tests, %d failed checks\n", ran, failures());
    return failures() || !ran;
}

}  // namespace testing

#define TEST(name)                                                    \
    static void name();                                               \
    static const testing::Registered registered_##name(#name, &name); \
    static void name()

#define CHECK(condition) testing::check(condition, __FILE__, __LINE__, #condition)
#define CHECK_WHERE(condition, where) \
    testing::check(condition, __FILE__, __LINE__, #condition + std::string(": ") + (where))
