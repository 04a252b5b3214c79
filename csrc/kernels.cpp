// The kernels of one instruction set. setup.py compiles this file once per instruction set, with
// FASTLLM_ISA naming the table. Everything else is in anonymous namespaces, and no code of the C++
// library is used: the linker could share such code between objects, and a processor without the
// instructions would run it.
#include "kernels.h"

#include <stdlib.h>
#include <time.h>

#include <type_traits>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_OPENMP)
extern "C" int omp_get_num_threads(void);  // declared here because omp.h contains code
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "vec.h"

namespace fastllm {

// Building blocks, then operations.
#include "scratch.inc"
#include "threads.inc"
#include "gemm.inc"
#include "integer_gemm.inc"
#include "linear.inc"

#include "adam.inc"
#include "dropout.inc"
#include "norm.inc"
#include "residual.inc"
#include "rope.inc"
#include "attention.inc"
#include "multi_head_attention.inc"
#include "mlp.inc"
#include "embedding.inc"
#include "linear_cross_entropy.inc"
#include "decoder_loss.inc"
#include "decode.inc"
#include "sampling.inc"
#include "checksum.inc"
#include "machine.inc"

#define FASTLLM_JOIN_(a, b) a##b
#define FASTLLM_JOIN(a, b) FASTLLM_JOIN_(a, b)
#define FASTLLM_STRING_(a) #a
#define FASTLLM_STRING(a) FASTLLM_STRING_(a)

extern const Kernels FASTLLM_JOIN(kernels_, FASTLLM_ISA) = {
    .isa = FASTLLM_STRING(FASTLLM_ISA),
    .native_bf16 = NATIVE_BF16,
    .adam_step = adam_step,
    .attention_fwd = attention_fwd,
    .attention_bwd = attention_bwd,
    .decode_weights_size = decode_weights_size,
    .decode_cache_size = decode_cache_size,
    .decode_pack = decode_pack,
    .decode = decode,
    .decoder_loss = decoder_loss,
    .dropout = dropout,
    .embedding_fwd = embedding_fwd,
    .embedding_bwd = embedding_bwd,
    .norm_fwd = norm_fwd,
    .norm_bwd = norm_bwd,
    .linear_cross_entropy = linear_cross_entropy,
    .mlp_fwd = mlp_fwd,
    .mlp_bwd = mlp_bwd,
    .multi_head_attention_fwd = multi_head_attention_fwd,
    .multi_head_attention_bwd = multi_head_attention_bwd,
    .sample = sample,
    .checksum = checksum,
    .scratch_bytes = scratch_bytes,
    .limit_scratch = limit_scratch,
    .fma_loop = fma_loop,
    .memory_read = memory_read,
    .memory_update = memory_update,
};

}  // namespace fastllm
