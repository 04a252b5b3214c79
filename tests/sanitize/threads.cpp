// Every kernel on several threads and from several callers at once, for ThreadSanitizer (make
// sanitize). The Python tests compare results with the reference; this program checks that they have
// the same bits for any number of threads, and that no thread hangs if memory is refused.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "../../csrc/kernels.h"

using namespace fastllm;

namespace {

const Kernels& k = kernels_base;

using Floats = std::vector<float>;
using Ids = std::vector<int64_t>;
using Outputs = std::vector<Floats>;

constexpr double P = 0.1;

// Dropout with this probability and a fixed seed.
Dropout with(double p) { return {p, 7}; }

// NaN, so that elements that a kernel fails to write show.
Floats empty(int64_t size) { return Floats(size, __builtin_nanf("")); }

// Inputs that are the same in every run: numbers in [-0.5, 0.5), ids, masks.
class Source {
public:
    Floats floats(int64_t size) {
        Floats numbers(size);
        for (float& x : numbers) x = next() / 16777216.0f - 0.5f;
        return numbers;
    }
    Ids ids(int64_t size, int64_t vocabulary) {
        Ids numbers(size);
        for (int64_t& id : numbers) id = next() % vocabulary;
        return numbers;
    }
    std::vector<uint8_t> mask(int64_t size) {
        std::vector<uint8_t> masked(size);
        for (uint8_t& m : masked) m = next() % 4 == 0;
        return masked;
    }

private:
    uint32_t state_ = 1;
    uint32_t next() { return (state_ = state_ * 1664525 + 1013904223) >> 8; }
};

// Parameters or gradients of a layer.
struct Pair {
    Floats weight, bias;
    Linear linear() const { return {weight.data(), bias.data()}; }
    Norm norm(NormKind kind = NormKind::LAYER) const {
        return {kind, weight.data(), bias.data(), 1e-5f, 0};
    }
    LinearGrad linear_grad() { return {weight.data(), bias.data()}; }
    NormGrad norm_grad() { return {weight.data(), bias.data()}; }
    void append_to(Outputs& outputs) const {
        outputs.push_back(weight);
        outputs.push_back(bias);
    }
};

Pair parameters(Source& source, int64_t outputs, int64_t inputs) {
    return {source.floats(outputs * inputs), source.floats(outputs)};
}
Pair gradients(int64_t outputs, int64_t inputs) {
    return {empty(outputs * inputs), empty(outputs)};
}

enum class Place { NONE, BEFORE, BEHIND };  // position of the norm
constexpr Place PLACES[] = {Place::NONE, Place::BEFORE, Place::BEHIND};

Outputs adam(bool decoupled, double max_grad_norm, int threads) {
    Source source;
    std::vector<int64_t> sizes = {1, 40000, 77, ADAM_BLOCK};
    Outputs arrays;
    std::vector<AdamTensor> tensors;
    int64_t blocks = 0;
    arrays.reserve(5 * sizes.size());
    for (const int64_t size : sizes) {
        float* pointers[5];
        for (int i = 0; i < 4; ++i) {
            arrays.push_back(source.floats(size));
            for (float& x : arrays.back()) x = i == 3 ? x * x : x;
            pointers[i] = arrays.back().data();
        }
        arrays.push_back({3});
        pointers[4] = arrays.back().data();
        tensors.push_back({pointers[0], pointers[1], pointers[2], pointers[3], pointers[4], size,
                           blocks, 1e-3, 0.9, 0.999, 1e-8, 0.01, 0, 0});
        blocks += (size + ADAM_BLOCK - 1) / ADAM_BLOCK;
    }
    std::vector<double> sums(blocks);
    const double norm = k.adam_step(tensors.data(), tensors.size(), sums.data(), blocks, decoupled,
                                    max_grad_norm, threads);
    arrays.push_back({float(norm)});
    return arrays;
}

// Heads that share keys and values, with norms, rotary positions, a window and a cap: what Llama,
// Qwen and Gemma add to plain attention.
enum class Heads { PLAIN, SHARED };

Scores scores_of(Heads heads, int64_t D, bool causal) {
    const float scale = 1 / std::sqrt(float(D));
    if (heads == Heads::SHARED && causal) return {true, 20, scale, 3};
    return {causal, 0, scale, 0};
}

// An attention with heads of each kind; the record's norms and table live here.
struct AttentionParts {
    AttentionParts(Source& source, Heads heads, int64_t S, int64_t N, int64_t D)
        : heads(heads),
          K(heads == Heads::SHARED ? 1 : N),
          width((N + 2 * K) * D),
          q_norm(parameters(source, D, 1)),
          k_norm(parameters(source, D, 1)),
          table(source.floats(S * (D / 2 * 2))) {}

    void add_to(MultiHeadAttention& m) const {
        if (heads == Heads::PLAIN) return;
        m.q_norm = q_norm.norm(NormKind::RMS);
        m.k_norm = k_norm.norm(NormKind::LAYER);
        m.rope = {table.data(), m.D / 2 * 2, false};
        m.scores = scores_of(heads, m.D, true);
    }

    Heads heads;
    int64_t K, width;
    Pair q_norm, k_norm;
    Floats table;
};

MultiHeadAttention attention_of(int64_t B, int64_t S, int64_t N, int64_t D,
                                const AttentionParts& parts, const Norm& norm, bool norm_first,
                                const Pair& qkv, const Pair& out, double p, Precision precision) {
    MultiHeadAttention m = {};
    m.B = B, m.S = S, m.H = N * D, m.N = N, m.K = parts.K, m.D = D;
    m.norm = norm, m.norm_first = norm_first;
    m.qkv[0] = qkv.linear(), m.out = out.linear();
    m.scores = scores_of(Heads::PLAIN, D, true);
    m.weights_dropout = m.out_dropout = with(p);
    m.residual_scale = 1, m.precision = precision;
    parts.add_to(m);
    return m;
}

Mlp mlp_of(int64_t rows, int64_t H, int64_t I, const Norm& norm, bool norm_first, const Pair& fc1,
           const Pair& fc2, bool gated, const Pair& up, Activation activation, double hidden_p,
           double out_p, Precision precision) {
    Mlp m = {};
    m.rows = rows, m.H = H, m.I = I;
    m.norm = norm, m.norm_first = norm_first;
    m.fc1 = fc1.linear(), m.fc2 = fc2.linear();
    m.gated = gated, m.up = up.linear(), m.activation = activation;
    m.hidden_dropout = with(hidden_p), m.out_dropout = with(out_p);
    m.residual_scale = 1, m.precision = precision;
    return m;
}

Outputs attention(int64_t S, int64_t T, int64_t D, bool causal, bool masked, double p, Heads heads,
                  int threads) {
    constexpr int64_t B = 2, N = 3;
    const int64_t K = heads == Heads::SHARED ? 1 : N;
    Source source;
    const Floats q = source.floats(B * N * S * D), key = source.floats(B * K * T * D),
                 v = source.floats(B * K * T * D), grad_out = source.floats(B * N * S * D);
    const std::vector<uint8_t> mask = source.mask(S * T);
    const Attention a = {B, N, K, S, T, D, {q.data(), {N * S * D, S * D, D}},
                         {key.data(), {K * T * D, T * D, D}}, {v.data(), {K * T * D, T * D, D}},
                         {masked ? mask.data() : nullptr, {0, 0, T, 1}},
                         scores_of(heads, D, causal), with(p)};
    Floats out = empty(q.size()), grad_q = empty(q.size()), grad_k = empty(v.size()),
           grad_v = empty(v.size());
    k.attention_fwd(out.data(), a, threads);
    k.attention_bwd(grad_q.data(), grad_k.data(), grad_v.data(), grad_out.data(), a, threads);
    return {out, grad_q, grad_k, grad_v};
}

Outputs multi_head_attention(int64_t B, int64_t S, int64_t N, int64_t D, Place place, double p,
                             Precision precision, Heads heads, int threads,
                             bool unequal = false) {
    Source source;
    const AttentionParts parts(source, heads, S, N, D);
    std::vector<int64_t> starts = {0};
    for (int64_t b = 0; b < B; ++b) starts.push_back(starts[b] + (unequal ? S - b % S : S));
    const int64_t H = N * D, rows = starts[B];
    const Pair norm = parameters(source, H, 1), qkv = parameters(source, parts.width, H),
               projection = parameters(source, H, H);
    const Floats x = source.floats(rows * H), grad_out = source.floats(rows * H);
    MultiHeadAttention m =
        attention_of(B, S, N, D, parts, place == Place::NONE ? Norm{} : norm.norm(),
                     place == Place::BEFORE, qkv, projection, p, precision);
    m.starts = unequal ? starts.data() : nullptr;
    Floats stats = empty(2 * rows), projected = empty(rows * parts.width),
           attn_out = empty(rows * H), sum = empty(rows * H), q_stats = empty(2 * rows * N),
           q_input = empty(rows * H), k_stats = empty(2 * rows * N), k_input = empty(rows * H);
    const MultiHeadAttentionSaved saved = {
        {place == Place::NONE ? nullptr : stats.data(),
         place == Place::BEHIND ? sum.data() : nullptr, nullptr, nullptr},
        projected.data(),
        attn_out.data(),
        {q_stats.data(), q_input.data()},
        {k_stats.data(), k_input.data()}};
    Outputs outputs = {empty(rows * H), empty(rows * H)};
    Pair grad_norm = gradients(H, 1), grad_qkv = gradients(parts.width, H),
         grad_projection = gradients(H, H), grad_q_norm = gradients(D, 1),
         grad_k_norm = gradients(D, 1);
    const bool shared = heads == Heads::SHARED;
    MultiHeadAttentionGrad grad = {};
    if (place != Place::NONE) grad.norm = grad_norm.norm_grad();
    grad.qkv[0] = grad_qkv.linear_grad(), grad.out = grad_projection.linear_grad();
    if (shared) grad.q_norm = grad_q_norm.norm_grad(), grad.k_norm = grad_k_norm.norm_grad();
    k.multi_head_attention_fwd(outputs[0].data(), saved, x.data(), m, threads);
    k.multi_head_attention_bwd(outputs[1].data(), grad, grad_out.data(), saved, x.data(), m,
                               threads);
    if (shared) grad_q_norm.append_to(outputs), grad_k_norm.append_to(outputs);
    if (place != Place::NONE) grad_norm.append_to(outputs);
    grad_qkv.append_to(outputs);
    grad_projection.append_to(outputs);
    return outputs;
}

Outputs mlp(int64_t rows, int64_t H, int64_t I, Place place, Activation activation, bool gated,
            double p, Precision precision, int threads) {
    Source source;
    const Pair norm = parameters(source, H, 1), fc1 = parameters(source, I, H),
               fc2 = parameters(source, H, I), up = parameters(source, I, H);
    const Floats x = source.floats(rows * H), grad_out = source.floats(rows * H);
    const Mlp m = mlp_of(rows, H, I, place == Place::NONE ? Norm{} : norm.norm(),
                         place == Place::BEFORE, fc1, fc2, gated, up, activation, p, p, precision);
    Floats stats = empty(2 * rows), hidden = empty(rows * I), up_out = empty(rows * I),
           sum = empty(rows * H);
    const MlpSaved saved = {{place == Place::NONE ? nullptr : stats.data(),
                             place == Place::BEHIND ? sum.data() : nullptr, nullptr, nullptr},
                            hidden.data(), gated ? up_out.data() : nullptr};
    Outputs outputs = {empty(rows * H), empty(rows * H)};
    Pair grad_norm = gradients(H, 1), grad_fc1 = gradients(I, H), grad_fc2 = gradients(H, I),
         grad_up = gradients(I, H);
    k.mlp_fwd(outputs[0].data(), saved, x.data(), x.data(), m, threads);
    k.mlp_bwd(outputs[1].data(), true,
              {place == Place::NONE ? NormGrad{} : grad_norm.norm_grad(), grad_fc1.linear_grad(),
               grad_fc2.linear_grad(), gated ? grad_up.linear_grad() : LinearGrad{}, {}},
              grad_out.data(), saved, x.data(), m, threads);
    if (gated) grad_up.append_to(outputs);
    if (place != Place::NONE) grad_norm.append_to(outputs);
    grad_fc1.append_to(outputs);
    grad_fc2.append_to(outputs);
    return outputs;
}

Outputs norm(int64_t rows, int64_t H, NormKind kind, bool with_residual, int threads) {
    Source source;
    const Pair pair = parameters(source, H, 1);
    const Norm norm = pair.norm(kind);
    const Floats x = source.floats(rows * H), residual = source.floats(rows * H),
                 grad_out = source.floats(rows * H);
    Floats out = empty(rows * H), stats = empty(2 * rows), sum = empty(rows * H),
           grad_x = empty(rows * H);
    Pair grad = gradients(H, 1);
    k.norm_fwd(out.data(), stats.data(), with_residual ? sum.data() : nullptr, x.data(),
               with_residual ? residual.data() : nullptr, rows, H, norm, threads);
    k.norm_bwd(grad_x.data(), grad.norm_grad(), grad_out.data(),
               with_residual ? sum.data() : x.data(), stats.data(), rows, H, norm, threads);
    return {out, stats, grad_x, grad.weight, grad.bias};
}

Outputs embedding(int64_t B, int64_t S, int64_t H, double p, int threads) {
    constexpr int64_t V = 150;
    Source source;
    const Ids ids = source.ids(B * S, V);
    const Floats weight = source.floats(V * H), positions = source.floats(S * H),
                 grad_out = source.floats(B * S * H);
    const Embedding e = {B, S, H, V, ids.data(), weight.data(), positions.data(), 2, with(p)};
    Floats out = empty(B * S * H), grad_weight = empty(V * H), grad_positions = empty(S * H);
    k.embedding_fwd(out.data(), e, threads);
    k.embedding_bwd(grad_weight.data(), grad_positions.data(), grad_out.data(), 3, e, threads);
    return {out, grad_weight, grad_positions};
}

Outputs linear_cross_entropy(int64_t rows, int64_t H, int64_t V, Precision precision,
                             int threads) {
    Source source;
    const Ids targets = source.ids(rows, V);
    const Pair head = parameters(source, V, H);
    const Floats x = source.floats(rows * H);
    Floats grad_x = empty(rows * H);
    Pair grad = gradients(V, H);
    const float loss = k.linear_cross_entropy(grad_x.data(), grad.linear_grad(), x.data(),
                                              {rows, H, V, targets.data(), 5, head.linear(),
                                               20, precision},
                                              threads);
    return {{loss}, grad_x, grad.weight, grad.bias};
}

Outputs dropout(int64_t size, int threads) {
    Source source;
    const Floats in = source.floats(size);
    Floats out = empty(size);
    k.dropout(out.data(), in.data(), size, with(P), threads);
    return {out};
}

constexpr int PAIRS = 7;  // in a decoder layer: norm, qkv, out, norm, fc1, fc2, up

Outputs decoder_loss(int64_t B, int64_t S, int64_t N, int64_t D, bool norm_first, bool backward,
                     Precision precision, Heads heads, int threads) {
    constexpr int64_t V = 66, L = 2;
    Source source;
    const AttentionParts parts(source, heads, S, N, D);
    const int64_t H = N * D, I = 2 * H;
    const Ids ids = source.ids(B * S, V);
    const Floats tokens = source.floats(V * H), positions = source.floats(S * H);
    const int64_t sizes[PAIRS][2] = {{H, 1}, {parts.width, H}, {H, H}, {H, 1},
                                     {I, H}, {H, I},           {I, H}};
    std::vector<Pair> pairs, grads;
    std::vector<Layer> layers;
    std::vector<LayerGrad> layer_grads;
    for (int64_t i = 0; i < L * PAIRS; ++i) {
        const auto [outputs, inputs] = sizes[i % PAIRS];
        pairs.push_back(parameters(source, outputs, inputs));
        grads.push_back(gradients(outputs, inputs));
    }
    for (int64_t l = 0; l < L; ++l) {
        const Pair* p = &pairs[l * PAIRS];
        Pair* g = &grads[l * PAIRS];
        layers.push_back({attention_of(B, S, N, D, parts, p[0].norm(), norm_first, p[1], p[2], P,
                                       precision),
                          mlp_of(B * S, H, I, p[3].norm(), norm_first, p[4], p[5], true, p[6],
                                 Activation::SILU, P, 0, precision),
                          heads == Heads::SHARED && norm_first});
        LayerGrad layer_grad = {};
        layer_grad.attention.norm = g[0].norm_grad();
        layer_grad.attention.qkv[0] = g[1].linear_grad();
        layer_grad.attention.out = g[2].linear_grad();
        layer_grad.mlp = {g[3].norm_grad(), g[4].linear_grad(), g[5].linear_grad(),
                          g[6].linear_grad(), {}};
        layer_grads.push_back(layer_grad);
    }
    const Pair norm = parameters(source, H, 1), head = parameters(source, V, H);
    Pair grad_norm = gradients(H, 1), grad_head = gradients(V, H);
    Floats grad_tokens = empty(V * H), grad_positions = empty(S * H);
    const Decoder d = {{B, S, H, V, ids.data(), tokens.data(), positions.data(), 1, with(P)},
                       layers.data(), L, norm.norm(),
                       {B * S, H, V, ids.data(), -100, head.linear(), 0, precision}, 5};
    const DecoderGrad grad = {grad_tokens.data(), grad_positions.data(), layer_grads.data(),
                              grad_norm.norm_grad(), grad_head.linear_grad()};
    Outputs outputs = {{float(k.decoder_loss(d, backward ? &grad : nullptr, threads))}};
    if (!backward) return outputs;
    outputs.push_back(grad_tokens);
    outputs.push_back(grad_positions);
    for (const Pair& pair : grads) pair.append_to(outputs);
    grad_norm.append_to(outputs);
    grad_head.append_to(outputs);
    return outputs;
}

// Prompts of unequal lengths, one of them later, then one token for each sequence.
Outputs decode(int64_t N, int64_t D, bool norm_first, Precision precision, Heads heads,
               int threads) {
    constexpr int64_t B = 3, V = 131, L = 2, CAPACITY = 40, STEPS = 4;
    constexpr int64_t COUNTS[STEPS][B] = {{30, 1, 0}, {1, 1, 17}, {1, 0, 1}, {1, 1, 1}};
    Source source;
    const AttentionParts parts(source, heads, CAPACITY, N, D);
    const int64_t H = N * D, I = 3 * H;
    const Floats tokens = source.floats(V * H), positions = source.floats(CAPACITY * H);
    const int64_t sizes[PAIRS][2] = {{H, 1}, {parts.width, H}, {H, H}, {H, 1},
                                     {I, H}, {H, I},           {I, H}};
    std::vector<Pair> pairs;
    std::vector<Layer> layers;
    for (int64_t i = 0; i < L * PAIRS; ++i)
        pairs.push_back(parameters(source, sizes[i % PAIRS][0], sizes[i % PAIRS][1]));
    for (int64_t l = 0; l < L; ++l) {
        const Pair* p = &pairs[l * PAIRS];
        layers.push_back({attention_of(1, 1, N, D, parts, p[0].norm(), norm_first, p[1], p[2], 0,
                                       precision),
                          mlp_of(1, H, I, p[3].norm(), norm_first, p[4], p[5], true, p[6],
                                 Activation::SILU, 0, 0, precision),
                          heads == Heads::SHARED && norm_first});
    }
    const Pair norm = parameters(source, H, 1), head = parameters(source, V, H);
    const Decoder d = {{1, 1, H, V, nullptr, tokens.data(), positions.data(), 1, with(0)},
                       layers.data(), L, norm_first ? norm.norm() : Norm{},
                       {1, H, V, nullptr, -100, head.linear(), 0, precision}, -1};
    Floats weights = empty(k.decode_weights_size(d, precision));
    k.decode_pack(weights.data(), d, precision, threads);
    float* caches[B];
    const Decoding g = {&d, weights.data(), precision, B, CAPACITY, caches};
    Floats all_caches = empty(B * k.decode_cache_size(g));
    for (int64_t b = 0; b < B; ++b) caches[b] = all_caches.data() + b * k.decode_cache_size(g);
    Outputs outputs;
    Floats logits = source.floats(B * V);
    int64_t lengths[B] = {}, previously[B] = {};
    for (const auto& counts : COUNTS) {
        const Ids ids = source.ids(counts[0] + counts[1] + counts[2], V);
        std::vector<Scored> scored;  // the last token of each
        for (int64_t b = 0, row = 0; b < B; row += counts[b++])
            if (counts[b] > 0) scored.push_back({row + counts[b] - 1, b});
        k.decode(logits.data(), g, ids.data(), counts, lengths, previously, scored.data(),
                 scored.size(), threads);
        for (int64_t b = 0; b < B; ++b) {
            if (counts[b] > 0) previously[b] = lengths[b];
            lengths[b] += counts[b];
        }
        outputs.push_back(logits);
    }
    return outputs;
}

Outputs sampling(int64_t V, int threads) {
    constexpr int64_t B = 5;
    Source source;
    const Floats logits = source.floats(B * V);
    const std::vector<uint8_t> seen = source.mask(B * V);
    const uint64_t seeds[B] = {1, 2, 3, 4, 5};
    Ids tokens(B);
    const std::vector<Sampling> settings(B, {0.3, 40, 0.9, 0.1, 1.2f});
    const uint64_t steps[B] = {7, 7, 8, 9, 0};
    k.sample(tokens.data(), logits.data(), B, V, settings.data(), seen.data(), seeds, steps,
             threads);
    return {Floats(tokens.begin(), tokens.end())};
}

struct Case {
    const char* name;
    std::function<Outputs(int threads)> run;
};

// Each kernel on both sides of its decisions: how work is divided, packed or in place, whole or
// partial vectors, with and without dropout.
// The cases of attention with heads of one kind.
void add_attention_cases(std::vector<Case>& all, Heads heads) {
    const auto add = [&](const char* name, auto run) { all.push_back({name, run}); };
    for (const double p : {0.0, P}) {
        add("attention", [=](int n) { return attention(9, 9, 5, true, false, p, heads, n); });
        add("attention", [=](int n) { return attention(20, 75, 32, false, true, p, heads, n); });
        for (const Place place : PLACES) {
            // B >= 4 threads: by sequence; else by rows and heads.
            const auto mha = [=](int64_t B, int64_t S, int64_t N, int64_t D) {
                return [=](int threads) {
                    return multi_head_attention(B, S, N, D, place, p, Precision::FP32, heads,
                                                threads);
                };
            };
            add("multi_head_attention", mha(16, 6, 3, 16));
            add("multi_head_attention", mha(3, 40, 4, 32));
            add("multi_head_attention", mha(1, 67, 3, 11));
        }
    }
    for (const int64_t B : {3, 16})
        add("multi_head_attention side by side", [=](int n) {
            return multi_head_attention(B, 20, 3, 16, Place::BEHIND, P, Precision::FP32, heads, n,
                                        true);
        });
    add("bf16 multi_head_attention", [=](int n) {
        return multi_head_attention(3, 33, 3, 11, Place::BEFORE, P, Precision::BF16, heads, n);
    });
    for (const auto precision : {Precision::FP32, Precision::BF16, Precision::INT8, Precision::INT4})
        for (const bool norm_first : {false, true}) {
            add("decode", [=](int n) { return decode(3, 16, norm_first, precision, heads, n); });
            add("decode", [=](int n) { return decode(2, 7, norm_first, precision, heads, n); });
        }
    for (const bool norm_first : {false, true})
        for (const bool backward : {true, false}) {
            const auto loss = [=](int64_t B, int64_t S, int64_t N, int64_t D) {
                return [=](int threads) {
                    return decoder_loss(B, S, N, D, norm_first, backward, Precision::FP32, heads,
                                        threads);
                };
            };
            add("decoder_loss", loss(13, 33, 3, 16));
            add("decoder_loss", loss(9, 70, 2, 7));
        }
    add("bf16 decoder_loss", [=](int threads) {
        return decoder_loss(9, 35, 2, 7, true, true, Precision::BF16, heads, threads);
    });
}

std::vector<Case> cases() {
    std::vector<Case> all;
    const auto add = [&](const char* name, auto run) { all.push_back({name, run}); };
    for (const Heads heads : {Heads::PLAIN, Heads::SHARED}) add_attention_cases(all, heads);
    for (const bool decoupled : {false, true})
        for (const double norm : {-1.0, 1.0})
            add("adam", [=](int threads) { return adam(decoupled, norm, threads); });
    for (const double p : {0.0, P}) {
        add("embedding", [=](int threads) { return embedding(4, 30, 72, p, threads); });
        add("embedding", [=](int threads) { return embedding(3, 7, 35, p, threads); });
        for (const Place place : PLACES) {
            for (const bool gated : {false, true}) {
                const auto activation = gated ? Activation::SILU : Activation::GELU;
                const auto of = [=](int64_t rows, int64_t H, int64_t I) {
                    return [=](int threads) {
                        return mlp(rows, H, I, place, activation, gated, p, Precision::FP32,
                                   threads);
                    };
                };
                add("mlp", of(120, 64, 520));
                add("mlp", of(45, 33, 130));
            }
        }
    }
    for (const NormKind kind : {NormKind::LAYER, NormKind::RMS}) {
        for (const bool residual : {false, true}) {
            add("norm", [=](int n) { return norm(100, 200, kind, residual, n); });
            add("norm", [=](int n) { return norm(37, 67, kind, residual, n); });
        }
    }
    add("bf16 mlp", [](int n) {
        return mlp(45, 33, 130, Place::BEHIND, Activation::GELU, true, P, Precision::BF16, n);
    });
    for (const auto precision : {Precision::FP32, Precision::BF16}) {
        add("linear_cross_entropy",
            [=](int n) { return linear_cross_entropy(70, 48, 301, precision, n); });
        add("linear_cross_entropy",
            [=](int n) { return linear_cross_entropy(20, 17, 2100, precision, n); });
    }
    add("sampling", [](int threads) { return sampling(67, threads); });
    add("sampling", [](int threads) { return sampling(3000, threads); });
    add("dropout", [](int threads) { return dropout(30001, threads); });
    return all;
}

void check_same(const char* name, const Outputs& actual, const Outputs& expected) {
    for (size_t i = 0; i < expected.size(); ++i) {
        const Floats &a = actual[i], &b = expected[i];
        for (const float x : a)
            if (!__builtin_isfinite(x)) {
                std::fprintf(stderr, "%s: output %zu contains NaN or Inf\n", name, i);
                std::exit(1);
            }
        if (std::memcmp(a.data(), b.data(), b.size() * sizeof(float)) != 0) {
            std::fprintf(stderr, "%s: output %zu depends on the number of threads\n", name, i);
            std::exit(1);
        }
    }
}

}  // namespace

// Runs a case while the kernels get little memory or none. Threads of its parallel regions are new,
// so each of them needs some. Returns whether it was refused.
bool runs_out_of_memory(const Case& test, int64_t available, const Outputs& expected) {
    k.limit_scratch(k.scratch_bytes() + available);
    bool refused = false;
    try {
        check_same(test.name, test.run(4), expected);
    } catch (const OutOfMemory&) {
        refused = true;
    }
    k.limit_scratch(INT64_MAX);
    return refused;
}

int main() {
    const std::vector<Case> all = cases();
    std::vector<Outputs> expected;
    int refusals = 0;
    for (const Case& test : all) {
        expected.push_back(test.run(1));
        check_same(test.name, test.run(4), expected.back());
        for (const int64_t available : {0, 1 << 18, 1 << 19})
            refusals += runs_out_of_memory(test, available, expected.back());
    }
    if (refusals == 0) {
        std::fprintf(stderr, "no kernel ran out of memory\n");
        return 1;
    }
    // Several callers at once, each running a different case.
    constexpr size_t CALLERS = 3;
    std::vector<std::thread> callers;
    for (size_t caller = 0; caller < CALLERS; ++caller)
        callers.emplace_back([&, caller] {
            for (size_t i = 0; i < all.size(); ++i) {
                const size_t at = (i + caller * all.size() / CALLERS) % all.size();
                check_same(all[at].name, all[at].run(2), expected[at]);
            }
        });
    for (std::thread& caller : callers) caller.join();
    std::printf("%zu cases: the same bits from 1 thread, 4 threads and %zu callers at once; "
                "memory refused %d times\n",
                all.size(), CALLERS, refusals);
}
