// Every CPU kernel, by name: the contents page of this folder.
//
// kernels.cpp is compiled once per instruction set, each time filling one table of function
// pointers; bindings.cpp picks the best table that the processor can run. Pointers are to
// contiguous fp32 data unless strides are given, and are not null unless a comment allows it. Sizes
// and strides count elements. Every kernel gives the same bits for any number of threads. The
// letters are those of the Python side: B sequences, S positions (T keys), N heads of size D, K heads
// of keys and values, H hidden size, I intermediate size, V vocabulary.
#pragma once

#include <cstdint>

namespace fastllm {

// Thrown by every kernel if the system refuses scratch memory. The outputs are then undefined.
struct OutOfMemory {
    int64_t bytes;  // the size of the refused request
};

// One parameter with its gradient, its optimizer state and its settings.
struct AdamTensor {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    float* step;
    int64_t size;
    int64_t first_block;  // index of its first block of ADAM_BLOCK elements among all tensors'
    double lr, beta1, beta2, eps, weight_decay;
    float step_size, inv_sqrt_bias_correction2;  // filled in by adam_step
};

// Small enough to divide a small model among many threads, large enough that distributing the
// blocks costs nothing.
constexpr int64_t ADAM_BLOCK = 8192;

// The type that operands of matrix products are rounded to; sums are always fp32. The integers, of
// weights that do not change, are described in integer_gemm.inc.
enum class Precision { FP32, BF16, INT8, INT4 };

// Dropout with probability p in [0, 1); seed and stream name the mask, see csrc/dropout.inc.
struct Dropout {
    double p;
    uint64_t seed;
    uint32_t stream = 0;
};

enum class NormKind { NONE, LAYER, RMS };

// A norm over the last dimension, or none.
struct Norm {
    NormKind kind;
    const float* weight;  // [H], or null for factors of 1
    const float* bias;    // [H] or null
    float eps;
    float offset;  // added to the weight

    explicit operator bool() const { return kind != NormKind::NONE; }
};

// y = x W^T + b
struct Linear {
    const float* weight;      // [outputs, inputs]
    const float* bias;        // [outputs] or null
    bool transposed = false;  // the weight and its gradient are stored as [inputs, outputs]
};

// Rotary positions: the first `size` elements of a head, in pairs i and i + size / 2, or 2 i and
// 2 i + 1 if interleaved, are rotated by the angles of their position.
struct Rope {
    const float* table;  // [S, size], cosines and then sines; null for none
    int64_t size;
    bool interleaved;

    explicit operator bool() const { return table; }
};

// Destinations of gradients; null if not needed.
struct NormGrad {
    float* weight;
    float* bias;
};
struct LinearGrad {
    float* weight;
    float* bias;
};

// [B, N, rows, D] with a contiguous last dimension.
struct Rows {
    const float* data;
    int64_t strides[3];
};

// Boolean [B, N, S, T], true where masked; null for none.
struct Mask {
    const uint8_t* data;
    int64_t strides[4];
};

// How scores [S, T] become weights.
struct Scores {
    bool causal;     // with T > S, the queries are the last S positions
    int64_t window;  // if causal, a query sees this many keys at most; 0 for all
    float scale;
    float softcap;  // softcap * tanh(score / softcap) replaces a scaled score; 0 for none
};

// Each head of k and v serves N / K heads of q in turn.
struct Attention {
    int64_t B, N, K, S, T, D;
    Rows q, k, v;
    Mask mask;
    Scores scores;
    Dropout dropout;  // of the weights
};

// [norm ->] qkv -> [q_norm, k_norm -> rope ->] attention -> out [-> out_norm] -> dropout
// [-> * residual_scale + x [-> norm]]. With a norm or out_norm there is a residual connection. Each
// sequence has S rows. Or, with `starts`, sequence b has rows [starts[b], starts[b + 1]), at most S
// of them, and there is no mask.
struct MultiHeadAttention {
    int64_t B, S, H, N, K, D;
    const int64_t* starts;  // [B + 1] or null
    Norm norm;
    bool norm_first;
    Linear qkv[3];  // the first has rows ordered q, k, v, each by head; or three if separate
    bool separate;
    Linear out;
    Norm q_norm, k_norm;  // of each head, [D]
    Rope rope;
    Mask mask;
    Scores scores;
    Dropout weights_dropout, out_dropout;
    Norm out_norm;
    float residual_scale;
    Precision precision;
};

// Saved by the forward of a sublayer for its backward. Null if not needed.
struct ResidualSaved {
    float* stats;      // [rows, 2], of the norm
    float* sum;        // [rows, H], x + sublayer(x): the input of a Post-LN norm
    float* out_stats;  // [rows, 2], of out_norm
    float* out;        // [rows, H], the input of out_norm
};

// The same for the norm of each head of queries or keys: [rows, heads, 2] and [rows, heads, D].
struct HeadNormSaved {
    float *stats, *input;
};

// Likewise; qkv and attn_out are never null.
struct MultiHeadAttentionSaved {
    ResidualSaved residual;
    float* qkv;       // [B S, (N + 2 K) D], queries and keys normalized and rotated
    float* attn_out;  // [B S, N D], the heads side by side: the input of the output projection
    HeadNormSaved q, k;
};

struct MultiHeadAttentionGrad {
    NormGrad norm;
    LinearGrad qkv[3], out;
    NormGrad q_norm, k_norm, out_norm;
};

enum class Activation { GELU, GELU_TANH, RELU, SILU, LEAKY_RELU, RELU_SQUARED };

// [norm ->] fc1 -> activation -> dropout -> fc2 [-> out_norm] -> dropout [-> * residual_scale + x
// [-> norm]], likewise. A gated MLP multiplies the activation by `up` of the same input.
struct Mlp {
    int64_t rows, H, I;
    Norm norm;
    bool norm_first;
    Linear fc1, fc2;
    bool gated;
    Linear up;  // unless gated, unused
    Activation activation;
    Dropout hidden_dropout, out_dropout;
    Norm out_norm;
    float residual_scale;
    Precision precision;
};

struct MlpSaved {
    ResidualSaved residual;
    float* hidden;  // [rows, I], the input of the activation
    float* up;      // [rows, I], what a gated MLP multiplies it by
};

struct MlpGrad {
    NormGrad norm;
    LinearGrad fc1, fc2, up;
    NormGrad out_norm;
};

struct Embedding {
    int64_t B, S, H, V;
    const int64_t* ids;      // [B, S]
    const float* weight;     // [V, H]
    const float* positions;  // [S, H] or null
    float scale;
    Dropout dropout;
};

struct LinearCrossEntropy {
    int64_t rows, H, V;
    const int64_t* targets;  // [rows]
    int64_t ignore_index;
    Linear head;
    float softcap;  // softcap * tanh(logit / softcap) replaces a logit; 0 for none
    Precision precision;
};

struct Layer {
    MultiHeadAttention attention;
    Mlp mlp;
    bool parallel;  // x + attention(x) + mlp(x): both have the same input
};

struct LayerGrad {
    MultiHeadAttentionGrad attention;
    MlpGrad mlp;
};

struct Decoder {
    Embedding embedding;
    const Layer* layers;
    int64_t layer_count;
    Norm norm;                // of the last layer's output; perhaps none
    LinearCrossEntropy head;  // targets are labels [B, S]: each position is scored on the next one
    int64_t padding_idx;      // neither learned nor a target; -1 for none
};

struct DecoderGrad {
    float* embedding;  // or null
    float* positions;  // or null
    const LayerGrad* layers;
    NormGrad norm;
    LinearGrad head;
};

// A decoder that continues sequences from their caches. Dropout is ignored.
struct Decoding {
    const Decoder* model;  // B and S of its parts are ignored; positions [capacity, H]
    const float* weights;  // see decode_pack
    Precision precision;   // of the weights
    int64_t B, capacity;   // number of sequences, and maximum length of each
    float* const* caches;  // [B], each of decode_cache_size floats, or null for an empty sequence

    // The oldest keys of a layer with a window are dropped, so many at a time.
    static constexpr int64_t STEP = 256;

    // Positions that the cache of a layer has room for.
    int64_t room(const MultiHeadAttention& a) const {
        const int64_t needed = a.scores.window + 2 * STEP;
        return a.scores.window && needed < capacity ? needed : capacity;
    }
    // The first position in the cache of a layer while up to STEP tokens follow `length` ones.
    int64_t origin(const MultiHeadAttention& a, int64_t length) const {
        const int64_t hidden = length - a.scores.window + 1;
        return room(a) < capacity && hidden > 0 ? hidden / STEP * STEP : 0;
    }
    // Whether a call must append at most STEP tokens to a sequence.
    bool drops_keys() const {
        for (int64_t l = 0; l < model->layer_count; ++l)
            if (room(model->layers[l].attention) < capacity) return true;
        return false;
    }
};

// A requested row of logits: row `place` of the output is for the token after row `row` of the ids.
struct Scored {
    int64_t row, place;
};

// How to choose a token; see fastllm/ops/sampling.py.
struct Sampling {
    double temperature;
    int64_t top_k;
    double top_p, min_p;
    float repetition_penalty;
};

struct Kernels {
    const char* isa;
    bool native_bf16;  // bf16 products are faster than fp32 products

    // adam.inc: clip all gradients by their joint norm, then update every parameter. `block_sums`
    // is scratch of one double per block. Returns the norm before clipping. A negative
    // max_grad_norm means no clipping: gradients are then read only once, and the result is 0.
    double (*adam_step)(AdamTensor* tensors, int64_t tensor_count, double* block_sums,
                        int64_t block_count, bool decoupled_weight_decay, double max_grad_norm,
                        int threads);

    // attention.inc: out [B, N, S, D]; the gradients likewise.
    void (*attention_fwd)(float* out, const Attention& a, int threads);
    void (*attention_bwd)(float* grad_q, float* grad_k, float* grad_v, const float* grad_out,
                          const Attention& a, int threads);

    // decode.inc: the sizes in floats of a Decoding's weights and of one sequence's cache; packing
    // of the weights; and decoding. decode() appends counts[b] tokens to each sequence b, of
    // lengths[b] tokens and previously[b] before the last call, and writes the requested rows of
    // logits [., V]; other rows keep their values. `ids` holds the new tokens of all sequences, one
    // sequence after the other.
    int64_t (*decode_weights_size)(const Decoder& d, Precision precision);
    int64_t (*decode_cache_size)(const Decoding& g);
    void (*decode_pack)(float* weights, const Decoder& d, Precision precision, int threads);
    void (*decode)(float* logits, const Decoding& g, const int64_t* ids, const int64_t* counts,
                   const int64_t* lengths, const int64_t* previously, const Scored* scored,
                   int64_t scored_count, int threads);

    // decoder_loss.inc: the mean cross-entropy of the next token, and its gradients unless `grad`
    // is null.
    double (*decoder_loss)(const Decoder& d, const DecoderGrad* grad, int threads);

    // dropout.inc: out = in * mask / (1 - p), element by element. It is its own backward.
    void (*dropout)(float* out, const float* in, int64_t size, const Dropout& dropout,
                    int threads);

    // embedding.inc: out = dropout(weight[ids] * scale + positions). Either gradient may be null.
    void (*embedding_fwd)(float* out, const Embedding& e, int threads);
    void (*embedding_bwd)(float* grad_weight, float* grad_positions, const float* grad_out,
                          int64_t padding_idx, const Embedding& e, int threads);

    // norm.inc: out = norm(x + residual); the residual may be null. stats [rows, 2] and the
    // sum [rows, H] are saved for the backward; both may be null, and so may grad_x.
    void (*norm_fwd)(float* out, float* stats, float* sum, const float* x,
                     const float* residual, int64_t rows, int64_t H, const Norm& norm,
                     int threads);
    void (*norm_bwd)(float* grad_x, const NormGrad& grad, const float* grad_out,
                     const float* sum, const float* stats, int64_t rows, int64_t H,
                     const Norm& norm, int threads);

    // linear_cross_entropy.inc: the mean of -log softmax(head(x))[target] over the rows with a
    // target, and its gradients. grad_x [rows, H] may be null.
    double (*linear_cross_entropy)(float* grad_x, const LinearGrad& grad, const float* x,
                                   const LinearCrossEntropy& c, int threads);

    // mlp.inc: the residual connection adds `base`, which is not x in a parallel layer; then grad_x
    // does not include its gradient, which is grad_out. grad_x may be null.
    void (*mlp_fwd)(float* out, const MlpSaved& saved, const float* x, const float* base,
                    const Mlp& m, int threads);
    void (*mlp_bwd)(float* grad_x, bool x_is_base, const MlpGrad& grad, const float* grad_out,
                    const MlpSaved& saved, const float* x, const Mlp& m, int threads);

    // multi_head_attention.inc: grad_x may be null.
    void (*multi_head_attention_fwd)(float* out, const MultiHeadAttentionSaved& saved,
                                     const float* x, const MultiHeadAttention& m, int threads);
    void (*multi_head_attention_bwd)(float* grad_x, const MultiHeadAttentionGrad& grad,
                                     const float* grad_out, const MultiHeadAttentionSaved& saved,
                                     const float* x, const MultiHeadAttention& m, int threads);

    // sampling.inc: draws tokens [B] from logits [B, V] by each sequence's settings, seed and step.
    // `seen` [B, V] is nonzero for tokens that occurred before, or null. Returns false if the
    // logits of a sequence contain NaN or their maximum is infinite.
    bool (*sample)(int64_t* tokens, const float* logits, int64_t B, int64_t V,
                   const Sampling* settings, const uint8_t* seen, const uint64_t* seeds,
                   const uint64_t* steps, int threads);

    // checksum.inc: of `size` floats, by their bits.
    uint64_t (*checksum)(const float* data, int64_t size, int threads);

    // scratch.inc: bytes of working memory that all threads hold between calls, and a limit on
    // them, for tests.
    int64_t (*scratch_bytes)();
    void (*limit_scratch)(int64_t bytes);

    // machine.inc: the peak rates of processor and memory. fma_loop returns the number of
    // floating-point operations done, memory_read the sum of the data.
    double (*fma_loop)(int64_t iterations, Precision precision, int threads);
    double (*memory_read)(const float* data, int64_t size, int threads);
    void (*memory_update)(float* data, int64_t size, int threads);
};

extern const Kernels kernels_base;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

}  // namespace fastllm
