#include "prompt.h"

namespace penguin {
constinit const Kernels kAvx512Kernels = kKernels;
}  // namespace penguin
