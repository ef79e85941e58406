#include "prompt.h"

namespace penguin {
constinit const Kernels kPortableKernels = kKernels;
}  // namespace penguin
