// The choice of an instruction set: the highest that processor and system support, or a lower one that is asked for.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/kernels.h"
#include "status.h"

namespace penguin {

enum class Isa { portable, avx2, avx512 };
constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512};
// The environment variable that asks for a lower one.
constexpr const char* kIsaVariable = "PENGUIN_EDGE_ISA";

const char* name_of(Isa isa);

// Whether the processor has it and the system keeps its registers.
bool supported(Isa isa);

// The kernels of an instruction set for heads of a size. A vector that does not divide the size is too wide: then they
// are those of the next narrower set. Only for sizes that `kv_attention` takes.
const Kernels& kernels_of(Isa isa, std::int64_t size);

struct IsaChoice {
    bool made = false;
    Isa isa = Isa::portable;
    std::string reason;
};

// `asked` is the value of the variable, or null; "" counts as null.
IsaChoice choose_isa(const char* asked);

// The choice of this process, made at the first call.
const IsaChoice& chosen_isa();

// The kernels that this process uses. Errors: the environment asks for what cannot run here.
Status find_kernels(std::int64_t size, const Kernels** out_kernels);

}  // namespace penguin
