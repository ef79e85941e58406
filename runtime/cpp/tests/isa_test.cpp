// Which instruction set is chosen, what is said about it, and what the variable asks for in a process of its own.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "isa.h"
#include "penguin_ops.h"
#include "testing.h"

namespace penguin {
namespace {

TEST(the_highest_is_chosen) {
    for (const char* nothing : {static_cast<const char*>(nullptr), ""}) {
        const IsaChoice choice = choose_isa(nothing);
        CHECK(choice.made && supported(choice.isa));
        for (const Isa isa : kIsas) CHECK(!supported(isa) || isa <= choice.isa);
        CHECK(choice.reason.find(name_of(choice.isa)) == 0);
    }
}

TEST(a_lower_one_is_chosen_when_asked) {
    for (const Isa isa : kIsas) {
        const IsaChoice choice = choose_isa(name_of(isa));
        CHECK(choice.made == supported(isa));
        if (choice.made) CHECK(choice.isa == isa && choice.reason.find(name_of(isa)) != std::string::npos);
        if (!choice.made)
            CHECK_WHERE(choice.reason.find("wanted an instruction set that this machine supports") != std::string::npos,
                        choice.reason);
    }
}

TEST(an_unknown_one_is_refused) {
    for (const char* asked : {"sse9", "AVX2", " avx2", "avx2 "}) {
        const IsaChoice choice = choose_isa(asked);
        CHECK(!choice.made);
        CHECK(choice.reason ==
              std::string("got PENGUIN_EDGE_ISA=") + asked + ", wanted one of portable, avx2, avx512; or unset it");
    }
}

TEST(kernels_divide_the_size_and_are_no_wider_than_asked) {
    for (const Isa isa : kIsas) {
        for (std::int64_t size = kSmallestHead; size <= kLargestHead; size += kHeadStep) {
            const Kernels& kernels = kernels_of(isa, size);
            CHECK(size % kernels.width == 0);
            CHECK(&kernels == &kPortableKernels || isa != Isa::portable);
        }
    }
}

// Runs `body` in a child that has the variable set; true if it returns true there.
bool in_child(const char* asked, bool (*body)()) {
    const pid_t child = fork();
    if (child == 0) {
        setenv(kIsaVariable, asked, 1);
        _exit(body() ? 0 : 1);
    }
    int result = 0;
    return child > 0 && waitpid(child, &result, 0) == child && WIFEXITED(result) && WEXITSTATUS(result) == 0;
}

TEST(the_variable_is_read_once_in_each_process) {
    CHECK(in_child("portable", [] {
        const Kernels* kernels = nullptr;
        return find_kernels(64, &kernels).ok() && kernels == &kPortableKernels &&
               std::strcmp(penguin_ops_isa(), "portable") == 0 &&
               std::strcmp(penguin_ops_reason(), "PENGUIN_EDGE_ISA=portable asks for it") == 0;
    }));
    CHECK(in_child("neverheard", [] {
        const Kernels* kernels = nullptr;
        const Status status = find_kernels(64, &kernels);
        return !status.ok() && status.sentence() == penguin_ops_reason() && !penguin_ops_isa();
    }));
}

TEST(version_and_abi) {
    CHECK(std::strcmp(penguin_ops_version(), PENGUIN_OPS_VERSION) == 0);
    CHECK(penguin_ops_abi() == PENGUIN_OPS_ABI);
}

}  // namespace
}  // namespace penguin

int main(int argc, char** argv) { return testing::run(argc, argv); }
