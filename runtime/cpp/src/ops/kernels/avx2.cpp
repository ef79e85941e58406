#include "prompt.h"

namespace penguin {
constinit const Kernels kAvx2Kernels = kKernels;
}  // namespace penguin
