#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "penguin_ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace penguin {
namespace {

#if defined(__x86_64__)
// Conversion of float16 has a flag of its own, which not every compiler can ask for by name.
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Isa highest() {
    Isa best = Isa::portable;
    for (const Isa isa : kIsas) {
        if (supported(isa)) best = isa;
    }
    return best;
}

std::string known() {
    std::string names;
    for (const Isa isa : kIsas) names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
    return names;
}

}  // namespace

const char* name_of(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

bool supported(Isa isa) {
    if (isa == Isa::portable) return true;
#if defined(__x86_64__)
    // These builtins also ask the system, by XGETBV, whether it keeps the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (isa == Isa::avx2) return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

const Kernels& kernels_of(Isa isa, std::int64_t size) {
#if defined(__x86_64__)
    if (isa == Isa::avx512 && size % kAvx512Kernels.width == 0) return kAvx512Kernels;
    if (isa != Isa::portable && size % kAvx2Kernels.width == 0) return kAvx2Kernels;
#else
    static_cast<void>(isa);
    static_cast<void>(size);
#endif
    return kPortableKernels;
}

IsaChoice choose_isa(const char* asked) {
    const Isa best = highest();
    if (!asked || !*asked) {
        return {true, best, std::string(name_of(best)) + " is the highest that this machine supports"};
    }
    const std::string variable = std::string(kIsaVariable) + "=" + asked;
    for (const Isa isa : kIsas) {
        if (std::strcmp(asked, name_of(isa)) != 0) continue;
        if (supported(isa)) return {true, isa, variable + " asks for it"};
        return {false, Isa::portable,
                "got " + variable + ", wanted an instruction set that this machine supports, " + name_of(best) +
                    " at most; set it lower, or unset it"};
    }
    return {false, Isa::portable, "got " + variable + ", wanted one of " + known() + "; or unset it"};
}

const IsaChoice& chosen_isa() {
    static const IsaChoice choice = choose_isa(std::getenv(kIsaVariable));
    return choice;
}

Status find_kernels(std::int64_t size, const Kernels** out_kernels) {
    const IsaChoice& choice = chosen_isa();
    if (!choice.made) return Status::error(choice.reason);
    *out_kernels = &kernels_of(choice.isa, size);
    return {};
}

}  // namespace penguin

extern "C" {

const char* penguin_ops_version() { return PENGUIN_OPS_VERSION; }

int32_t penguin_ops_abi() { return PENGUIN_OPS_ABI; }

const char* penguin_ops_isa() {
    const penguin::IsaChoice& choice = penguin::chosen_isa();
    return choice.made ? penguin::name_of(choice.isa) : nullptr;
}

const char* penguin_ops_reason() { return penguin::chosen_isa().reason.c_str(); }

}  // extern "C"
