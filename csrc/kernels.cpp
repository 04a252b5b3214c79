// The kernels of one instruction set. setup.py compiles this file once for each, with
// FASTLLM_ISA naming the table. Everything else is in anonymous namespaces and nothing of the
// C++ library is used: whatever the linker could share between two such objects, a processor
// might run that lacks the instructions.
#include "kernels.h"

#include "vec.h"

namespace fastllm {

#include "adam.inc"
#include "dropout.inc"
#include "machine.inc"

#define FASTLLM_JOIN_(a, b) a##b
#define FASTLLM_JOIN(a, b) FASTLLM_JOIN_(a, b)
#define FASTLLM_STRING_(a) #a
#define FASTLLM_STRING(a) FASTLLM_STRING_(a)

extern const Kernels FASTLLM_JOIN(kernels_, FASTLLM_ISA) = {
    .isa = FASTLLM_STRING(FASTLLM_ISA),
    .adam_step = adam_step,
    .dropout = dropout,
    .fma_loop = fma_loop,
    .memory_read = memory_read,
    .memory_update = memory_update,
};

}  // namespace fastllm
