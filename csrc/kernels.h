// Every CPU kernel, by name: the contents page of this folder.
//
// kernels.cpp is compiled once per instruction set and fills one table of function pointers each
// time; bindings.cpp picks the best table that the processor can run. Pointers are to fp32 data,
// sizes count elements, and every kernel gives the same bits for any number of threads.
#pragma once

#include <cstdint>

namespace fastllm {

// One parameter with its gradient, its optimizer state and its settings.
struct AdamTensor {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    float* step;
    int64_t size;
    int64_t first_block;  // where its blocks of ADAM_BLOCK elements begin among everybody's
    double lr, beta1, beta2, eps, weight_decay;
    float step_size, inv_sqrt_bias_correction2;  // filled in by adam_step
};

// Small enough to share a small model among many threads, large enough that handing out a block
// costs nothing.
constexpr int64_t ADAM_BLOCK = 8192;

// Which random numbers an element meets; see csrc/dropout.inc.
struct DropoutKey {
    uint64_t seed;
    uint32_t stream;
};

struct Kernels {
    const char* isa;

    // adam.inc: clip all gradients together, then update every parameter. `block_sums` is scratch
    // of one double a block. Returns the norm of all gradients before clipping, or 0 without
    // clipping (max_grad_norm < 0), when no gradient is read twice.
    double (*adam_step)(AdamTensor* tensors, int64_t tensor_count, double* block_sums,
                        int64_t block_count, bool decoupled_weight_decay, double max_grad_norm,
                        int threads);

    // dropout.inc: out = in * keep / (1 - p), element by element; its own backward.
    void (*dropout)(float* out, const float* in, int64_t size, double p, DropoutKey key,
                    int threads);

    // machine.inc: what the processor and the memory can do at best. The first two return the
    // number of floating-point operations done and the sum of what was read.
    double (*fma_loop)(int64_t iterations, int threads);
    double (*memory_read)(const float* data, int64_t size, int threads);
    void (*memory_update)(float* data, int64_t size, int threads);
};

extern const Kernels kernels_base;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

}  // namespace fastllm
