/* What each library of penguin-edge's operators says about itself. Nothing else is exported but the entry point of its
   engine. Strings are UTF-8, belong to the library and live as long as it is loaded; any thread may call. */
#ifndef PENGUIN_OPS_H
#define PENGUIN_OPS_H

#include <stdint.h>

/* The version of the distribution; the number that changes with the inputs, outputs or attributes of an operator. */
#define PENGUIN_OPS_VERSION "0.1.0"
#define PENGUIN_OPS_ABI 1

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PENGUIN_OPS_EXPORT __attribute__((visibility("default")))
#else
#define PENGUIN_OPS_EXPORT
#endif

PENGUIN_OPS_EXPORT const char *penguin_ops_version(void); /* PENGUIN_OPS_VERSION; since 0.1 */
PENGUIN_OPS_EXPORT int32_t penguin_ops_abi(void);         /* PENGUIN_OPS_ABI; since 0.1 */

/* The instruction set in use: "portable", "avx2" or "avx512". NULL when PENGUIN_EDGE_ISA asks for one that is unknown
   or that this machine lacks; then every operator fails with the sentence of penguin_ops_reason. Since 0.1. */
PENGUIN_OPS_EXPORT const char *penguin_ops_isa(void);

/* Why it is that one, or why there is none: one sentence. Since 0.1. */
PENGUIN_OPS_EXPORT const char *penguin_ops_reason(void);

#ifdef __cplusplus
}
#endif

#endif
