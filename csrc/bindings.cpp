// The extension module fastllm._kernels: picks the table for this processor and calls it. Tensors
// come as addresses, 0 for null; the records of kernels.h come as classes of the same names, with
// keywords for their fields. The operations in fastllm/ops have checked device, dtype, sizes and
// strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoding.h"
#include "kernels.h"
#include "memory.h"

namespace py = pybind11;
using namespace fastllm;
using py::arg;

namespace {

// Every table that this processor can run, slowest first.
std::vector<const Kernels*> runnable_tables() {
    std::vector<const Kernels*> tables = {&kernels_base};
#ifdef FASTLLM_X86_TABLES
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx2) tables.push_back(&kernels_avx2);
    if (avx512) tables.push_back(&kernels_avx512);
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        tables.push_back(&kernels_avx512_bf16);
#endif
    return tables;
}

const std::vector<const Kernels*> tables = runnable_tables();
std::atomic<const Kernels*> table_in_use = tables.back();

// The table in use. Every entry point asks once, so that set_isa may be called beside it.
const Kernels& kernels() { return *table_in_use.load(); }

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels* table : tables) names.push_back(table->isa);
    return names;
}

void set_isa(const std::string& isa) {
    std::string names;
    for (const Kernels* table : tables) {
        if (isa == table->isa) {
            table_in_use = table;
            return;
        }
        names += std::string(names.empty() ? "" : ", ") + table->isa;
    }
    throw std::invalid_argument("this CPU has no kernels for the instruction set '" + isa +
                                "'; it can run: " + names);
}

void translate_out_of_memory(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const OutOfMemory& refused) {
        const std::string message = "the system refused " + std::to_string(refused.bytes) +
                                    " bytes of memory for the C++ kernels";
        py::set_error(PyExc_MemoryError, message.c_str());
    }
}

using Address = uint64_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// A record that may be missing: None in Python, null pointers in kernels.h.
template <typename Record>
Record or_null(const Record* record) {
    return record ? *record : Record{};
}

// `record` with the one or three projections of q, k and v.
template <typename Record, typename Projection>
Record with_projections(Record record, const std::vector<Projection>& projections) {
    if (projections.size() != 1 && projections.size() != 3)
        throw std::invalid_argument("q, k and v need one projection or three");
    std::copy(projections.begin(), projections.end(), record.qkv);
    return record;
}

// Parameters that share their settings, as in fastllm/ops/adam.py.
struct AdamGroup {
    std::vector<Address> params, grads, exp_avgs, exp_avg_sqs, steps;
    std::vector<int64_t> sizes;
    double lr, beta1, beta2, eps, weight_decay;
};

double adam_step(const std::vector<const AdamGroup*>& groups, bool decoupled_weight_decay,
                 double max_grad_norm, int threads) {
    std::vector<AdamTensor> tensors;
    int64_t blocks = 0;
    for (const AdamGroup* g : groups)
        for (size_t i = 0; i < g->sizes.size(); ++i) {
            tensors.push_back({at<float>(g->params.at(i)), at<const float>(g->grads.at(i)),
                               at<float>(g->exp_avgs.at(i)), at<float>(g->exp_avg_sqs.at(i)),
                               at<float>(g->steps.at(i)), g->sizes[i], blocks, g->lr, g->beta1,
                               g->beta2, g->eps, g->weight_decay, 0, 0});
            blocks += (g->sizes[i] + ADAM_BLOCK - 1) / ADAM_BLOCK;
        }
    std::vector<double> block_sums(blocks);
    py::gil_scoped_release release;
    return kernels().adam_step(tensors.data(), tensors.size(), block_sums.data(), blocks,
                               decoupled_weight_decay, max_grad_norm, threads);
}

// A DecoderGrad, whose pointers belong to parameters with the addresses that the decoder has.
class OwnedDecoderGrad {
public:
    explicit OwnedDecoderGrad(const Decoder& d) : layers_(d.layer_count) {
        grad.layers = layers_.data();
        slots_ = {{d.embedding.weight, &grad.embedding}, {d.embedding.positions, &grad.positions}};
        for (int64_t l = 0; l < d.layer_count; ++l) {
            const auto& [attention, mlp, parallel] = d.layers[l];
            auto& [attention_grad, mlp_grad] = layers_[l];
            for (int i = 0; i < (attention.separate ? 3 : 1); ++i)
                add(attention.qkv[i], attention_grad.qkv[i]);
            add(attention.out, attention_grad.out);
            add(attention.norm, attention_grad.norm);
            add(attention.q_norm, attention_grad.q_norm);
            add(attention.k_norm, attention_grad.k_norm);
            add(attention.out_norm, attention_grad.out_norm);
            add(mlp.fc1, mlp_grad.fc1);
            add(mlp.fc2, mlp_grad.fc2);
            if (mlp.gated) add(mlp.up, mlp_grad.up);
            add(mlp.norm, mlp_grad.norm);
            add(mlp.out_norm, mlp_grad.out_norm);
        }
        add(d.norm, grad.norm);
        add(d.head.head, grad.head);
    }
    OwnedDecoderGrad(const OwnedDecoderGrad&) = delete;

    // The gradient of the parameter at this address goes to `to`. A tied parameter has two: each
    // call sets one of them, and autograd adds them up.
    void set(const float* parameter, float* to) {
        for (size_t tries = 0; tries < slots_.size(); ++tries) {
            Slot& slot = slots_[next_++ % slots_.size()];  // the next one, if orders are the same
            if (slot.parameter != parameter) continue;
            *slot.grad = to;
            slot.parameter = nullptr;
            return;
        }
        throw std::invalid_argument("a gradient is of a tensor that the decoder does not have");
    }

    DecoderGrad grad = {};

private:
    struct Slot {
        const float* parameter;
        float** grad;
    };

    template <typename Parameters, typename Grads>
    void add(const Parameters& parameters, Grads& grads) {
        slots_.push_back({parameters.weight, &grads.weight});
        slots_.push_back({parameters.bias, &grads.bias});
    }

    std::vector<LayerGrad> layers_;
    std::vector<Slot> slots_;
    size_t next_ = 0;
};

// The gradients of these parameters go to `grads`, 0 for those that are not needed; no gradients at
// all without `grads`.
double decoder_loss(const OwnedDecoder& model, const Batch& batch,
                    const std::vector<Address>& parameters,
                    const std::optional<std::vector<Address>>& grads, int threads) {
    const OwnedDecoder owned = model.for_batch(batch);
    const Decoder& decoder = owned.decoder;
    check_ids(batch.ids, batch.B * batch.S, decoder.embedding.V);
    for (int64_t b = 0; b < batch.B; ++b)  // the first label of a sequence is not a target
        check_ids(batch.labels + b * batch.S + 1, batch.S - 1, decoder.head.V,
                  batch.ignore_index);
    if (!grads) return kernels().decoder_loss(decoder, nullptr, threads);
    OwnedDecoderGrad grad(decoder);
    for (size_t i = 0; i < parameters.size(); ++i)
        if (parameters[i]) grad.set(at<const float>(parameters[i]), at<float>(grads->at(i)));
    return kernels().decoder_loss(decoder, &grad.grad, threads);
}

void define_records(py::module_& m) {
    py::class_<Norm>(m, "Norm")
        .def(py::init([](int kind, Address weight, Address bias, float eps, float offset) {
                 return Norm{static_cast<NormKind>(kind), at<const float>(weight),
                             at<const float>(bias), eps, offset};
             }),
             py::kw_only(), arg("kind"), arg("weight"), arg("bias"), arg("eps"), arg("offset"));
    py::class_<NormGrad>(m, "NormGrad")
        .def(py::init([](Address weight, Address bias) {
                 return NormGrad{at<float>(weight), at<float>(bias)};
             }),
             py::kw_only(), arg("weight"), arg("bias"));
    py::class_<Linear>(m, "Linear")
        .def(py::init([](Address weight, Address bias, bool transposed) {
                 return Linear{at<const float>(weight), at<const float>(bias), transposed};
             }),
             py::kw_only(), arg("weight"), arg("bias"), arg("transposed"));
    py::class_<LinearGrad>(m, "LinearGrad")
        .def(py::init([](Address weight, Address bias) {
                 return LinearGrad{at<float>(weight), at<float>(bias)};
             }),
             py::kw_only(), arg("weight"), arg("bias"));
    py::class_<Rope>(m, "Rope")
        .def(py::init([](Address table, int64_t size, bool interleaved) {
                 return Rope{at<const float>(table), size, interleaved};
             }),
             py::kw_only(), arg("table"), arg("size"), arg("interleaved"));
    py::class_<Dropout>(m, "Dropout")
        .def(py::init([](double p, uint64_t seed) { return Dropout{p, seed}; }), py::kw_only(),
             arg("p"), arg("seed"));
    py::class_<Mask>(m, "Mask")
        .def(py::init([](Address data, const std::array<int64_t, 4>& s) {
                 return Mask{at<const uint8_t>(data), {s[0], s[1], s[2], s[3]}};
             }),
             py::kw_only(), arg("data"), arg("strides"));
    py::class_<Rows>(m, "Rows")
        .def(py::init([](Address data, const std::array<int64_t, 3>& s) {
                 return Rows{at<const float>(data), {s[0], s[1], s[2]}};
             }),
             py::kw_only(), arg("data"), arg("strides"));
    py::class_<Attention>(m, "Attention")
        .def(py::init([](int64_t B, int64_t N, int64_t K, int64_t S, int64_t T, int64_t D,
                         const Rows& q, const Rows& k, const Rows& v, const Mask* mask, bool causal,
                         int64_t window, float scale, float softcap, const Dropout& dropout) {
                 return Attention{B, N, K, S, T, D, q, k, v, or_null(mask),
                                  {causal, window, scale, softcap}, dropout};
             }),
             py::kw_only(), arg("B"), arg("N"), arg("K"), arg("S"), arg("T"), arg("D"), arg("q"),
             arg("k"), arg("v"), arg("mask"), arg("causal"), arg("window"), arg("scale"),
             arg("softcap"), arg("dropout"));
    py::class_<MultiHeadAttention>(m, "MultiHeadAttention")
        .def(py::init([](int64_t B, int64_t S, int64_t H, int64_t N, int64_t K, int64_t D,
                         Address starts, const Norm* norm, bool norm_first,
                         const std::vector<Linear>& qkv, const Linear& out, const Norm* q_norm,
                         const Norm* k_norm, const Rope* rope, const Mask* mask, bool causal,
                         int64_t window, float scale, float softcap,
                         const Dropout& weights_dropout, const Dropout& out_dropout,
                         const Norm* out_norm, float residual_scale, int precision) {
                 return with_projections(
                     MultiHeadAttention{B, S, H, N, K, D, at<const int64_t>(starts),
                                        or_null(norm), norm_first, {}, qkv.size() == 3, out,
                                        or_null(q_norm), or_null(k_norm), or_null(rope),
                                        or_null(mask), {causal, window, scale, softcap},
                                        weights_dropout, out_dropout, or_null(out_norm),
                                        residual_scale, static_cast<Precision>(precision)},
                     qkv);
             }),
             py::kw_only(), arg("B"), arg("S"), arg("H"), arg("N"), arg("K"), arg("D"),
             arg("starts"), arg("norm"), arg("norm_first"), arg("qkv"), arg("out"), arg("q_norm"),
             arg("k_norm"), arg("rope"), arg("mask"), arg("causal"), arg("window"), arg("scale"),
             arg("softcap"), arg("weights_dropout"), arg("out_dropout"), arg("out_norm"),
             arg("residual_scale"), arg("precision"));
    py::class_<ResidualSaved>(m, "ResidualSaved")
        .def(py::init([](Address stats, Address sum, Address out_stats, Address out) {
                 return ResidualSaved{at<float>(stats), at<float>(sum), at<float>(out_stats),
                                      at<float>(out)};
             }),
             py::kw_only(), arg("stats"), arg("sum"), arg("out_stats"), arg("out"));
    py::class_<HeadNormSaved>(m, "HeadNormSaved")
        .def(py::init([](Address stats, Address input) {
                 return HeadNormSaved{at<float>(stats), at<float>(input)};
             }),
             py::kw_only(), arg("stats"), arg("input"));
    py::class_<MultiHeadAttentionSaved>(m, "MultiHeadAttentionSaved")
        .def(py::init([](const ResidualSaved& residual, Address qkv, Address attn_out,
                         const HeadNormSaved& q, const HeadNormSaved& k) {
                 return MultiHeadAttentionSaved{residual, at<float>(qkv), at<float>(attn_out), q,
                                                k};
             }),
             py::kw_only(), arg("residual"), arg("qkv"), arg("attn_out"), arg("q"), arg("k"));
    py::class_<MultiHeadAttentionGrad>(m, "MultiHeadAttentionGrad")
        .def(py::init([](const NormGrad* norm, const std::vector<LinearGrad>& qkv,
                         const LinearGrad& out, const NormGrad* q_norm, const NormGrad* k_norm,
                         const NormGrad* out_norm) {
                 return with_projections(
                     MultiHeadAttentionGrad{or_null(norm), {}, out, or_null(q_norm),
                                            or_null(k_norm), or_null(out_norm)},
                     qkv);
             }),
             py::kw_only(), arg("norm"), arg("qkv"), arg("out"), arg("q_norm"), arg("k_norm"),
             arg("out_norm"));
    py::class_<Mlp>(m, "Mlp")
        .def(py::init([](int64_t rows, int64_t H, int64_t I, const Norm* norm, bool norm_first,
                         const Linear& fc1, const Linear& fc2, const Linear* up, int activation,
                         const Dropout& hidden_dropout, const Dropout& out_dropout,
                         const Norm* out_norm, float residual_scale, int precision) {
                 return Mlp{rows, H, I, or_null(norm), norm_first, fc1, fc2, up != nullptr,
                            or_null(up), static_cast<Activation>(activation), hidden_dropout,
                            out_dropout, or_null(out_norm), residual_scale,
                            static_cast<Precision>(precision)};
             }),
             py::kw_only(), arg("rows"), arg("H"), arg("I"), arg("norm"), arg("norm_first"),
             arg("fc1"), arg("fc2"), arg("up"), arg("activation"), arg("hidden_dropout"),
             arg("out_dropout"), arg("out_norm"), arg("residual_scale"), arg("precision"));
    py::class_<MlpSaved>(m, "MlpSaved")
        .def(py::init([](const ResidualSaved& residual, Address hidden, Address up) {
                 return MlpSaved{residual, at<float>(hidden), at<float>(up)};
             }),
             py::kw_only(), arg("residual"), arg("hidden"), arg("up"));
    py::class_<MlpGrad>(m, "MlpGrad")
        .def(py::init([](const NormGrad* norm, const LinearGrad& fc1, const LinearGrad& fc2,
                         const LinearGrad* up, const NormGrad* out_norm) {
                 return MlpGrad{or_null(norm), fc1, fc2, or_null(up), or_null(out_norm)};
             }),
             py::kw_only(), arg("norm"), arg("fc1"), arg("fc2"), arg("up"), arg("out_norm"));
    py::class_<Embedding>(m, "Embedding")
        .def(py::init([](int64_t B, int64_t S, int64_t H, int64_t V, Address ids, Address weight,
                         Address positions, float scale, const Dropout& dropout) {
                 return Embedding{B, S, H, V, at<const int64_t>(ids), at<const float>(weight),
                                  at<const float>(positions), scale, dropout};
             }),
             py::kw_only(), arg("B"), arg("S"), arg("H"), arg("V"), arg("ids"), arg("weight"),
             arg("positions"), arg("scale"), arg("dropout"));
    py::class_<LinearCrossEntropy>(m, "LinearCrossEntropy")
        .def(py::init([](int64_t rows, int64_t H, int64_t V, Address targets,
                         int64_t ignore_index, const Linear& head, float softcap, int precision) {
                 return LinearCrossEntropy{rows, H, V, at<const int64_t>(targets), ignore_index,
                                           head, softcap, static_cast<Precision>(precision)};
             }),
             py::kw_only(), arg("rows"), arg("H"), arg("V"), arg("targets"), arg("ignore_index"),
             arg("head"), arg("softcap"), arg("precision"));
    py::class_<Layer>(m, "Layer")
        .def(py::init([](const MultiHeadAttention& attention, const Mlp& mlp, bool parallel) {
                 return Layer{attention, mlp, parallel};
             }),
             py::kw_only(), arg("attention"), arg("mlp"), arg("parallel"));
    py::class_<OwnedDecoder>(m, "Decoder")
        .def(py::init([](const Embedding& embedding, std::vector<Layer> layers, const Norm* norm,
                         const LinearCrossEntropy& head, int64_t padding_idx) {
                 return std::make_unique<OwnedDecoder>(embedding, std::move(layers),
                                                       or_null(norm), head, padding_idx);
             }),
             py::kw_only(), arg("embedding"), arg("layers"), arg("norm"), arg("head"),
             arg("padding_idx"));
    py::class_<Batch>(m, "Batch")
        .def(py::init([](int64_t B, int64_t S, Address ids, Address labels, int64_t ignore_index,
                         const Mask* mask, std::vector<Dropout> dropouts, int precision) {
                 return Batch{B, S, at<const int64_t>(ids), at<const int64_t>(labels),
                              ignore_index, or_null(mask), std::move(dropouts),
                              static_cast<Precision>(precision)};
             }),
             py::kw_only(), arg("B"), arg("S"), arg("ids"), arg("labels"), arg("ignore_index"),
             arg("mask"), arg("dropouts"), arg("precision"));
    py::class_<AdamGroup>(m, "AdamGroup")
        .def(py::init([](std::vector<Address> params, std::vector<Address> grads,
                         std::vector<Address> exp_avgs, std::vector<Address> exp_avg_sqs,
                         std::vector<Address> steps, std::vector<int64_t> sizes, double lr,
                         double beta1, double beta2, double eps, double weight_decay) {
                 return AdamGroup{std::move(params), std::move(grads), std::move(exp_avgs),
                                  std::move(exp_avg_sqs), std::move(steps), std::move(sizes), lr,
                                  beta1, beta2, eps, weight_decay};
             }),
             py::kw_only(), arg("params"), arg("grads"), arg("exp_avgs"), arg("exp_avg_sqs"),
             arg("steps"), arg("sizes"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
             arg("weight_decay"));
    py::class_<Sampling>(m, "Sampling")
        .def(py::init([](double temperature, int64_t top_k, double top_p, double min_p,
                         float repetition_penalty) {
                 return Sampling{temperature, top_k, top_p, min_p, repetition_penalty};
             }),
             py::kw_only(), arg("temperature"), arg("top_k"), arg("top_p"), arg("min_p"),
             arg("repetition_penalty"));
}

void define_decoding(py::module_& m) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<PackedDecoder, std::shared_ptr<PackedDecoder>>(m, "PackedDecoder",
                                                              "A decoder as decoding reads it.")
        .def(py::init([](const OwnedDecoder& decoder, int precision, int threads) {
                 const py::gil_scoped_release release;
                 return std::make_shared<PackedDecoder>(
                     kernels(), decoder, static_cast<Precision>(precision), threads);
             }),
             py::kw_only(), arg("decoder"), arg("precision"), arg("threads"));
    py::class_<DecodingState>(m, "Decoding", "Sequences that a decoder model continues.")
        .def(py::init<std::shared_ptr<PackedDecoder>, int64_t, int64_t>(), py::kw_only(),
             arg("packed"), arg("B"), arg("capacity"))
        .def(
            "extend",
            [](DecodingState& self, const std::vector<std::vector<int64_t>>& tokens,
               Address logits, bool in_place, bool every, int threads) {
                self.extend(tokens, at<float>(logits), in_place, every, threads);
            },
            arg("tokens"), arg("logits"), arg("in_place"), arg("every"), arg("threads"), no_gil)
        .def("clear", &DecodingState::clear, arg("sequence"), no_gil)
        .def_property_readonly("cache_bytes", &DecodingState::cache_bytes)
        .def_property_readonly("lengths", py::cpp_function(&DecodingState::lengths, no_gil));
}

void define_kernels(py::module_& m) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    m.def("adam_step", adam_step, py::kw_only(), arg("groups"), arg("decoupled_weight_decay"),
          arg("max_grad_norm"), arg("threads"));
    m.def(
        "attention_fwd",
        [](Address out, const Attention& attention, int threads) {
            kernels().attention_fwd(at<float>(out), attention, threads);
        },
        py::kw_only(), arg("out"), arg("attention"), arg("threads"), no_gil);
    m.def(
        "attention_bwd",
        [](Address grad_q, Address grad_k, Address grad_v, Address grad_out,
           const Attention& attention, int threads) {
            kernels().attention_bwd(at<float>(grad_q), at<float>(grad_k), at<float>(grad_v),
                                    at<const float>(grad_out), attention, threads);
        },
        py::kw_only(), arg("grad_q"), arg("grad_k"), arg("grad_v"), arg("grad_out"),
        arg("attention"), arg("threads"), no_gil);
    m.def(
        "multi_head_attention_fwd",
        [](Address out, const MultiHeadAttentionSaved& saved, Address x,
           const MultiHeadAttention& attention, int threads) {
            kernels().multi_head_attention_fwd(at<float>(out), saved, at<const float>(x),
                                               attention, threads);
        },
        py::kw_only(), arg("out"), arg("saved"), arg("x"), arg("attention"), arg("threads"),
        no_gil);
    m.def(
        "multi_head_attention_bwd",
        [](Address grad_x, const MultiHeadAttentionGrad& grad, Address grad_out,
           const MultiHeadAttentionSaved& saved, Address x, const MultiHeadAttention& attention,
           int threads) {
            kernels().multi_head_attention_bwd(at<float>(grad_x), grad, at<const float>(grad_out),
                                               saved, at<const float>(x), attention, threads);
        },
        py::kw_only(), arg("grad_x"), arg("grad"), arg("grad_out"), arg("saved"), arg("x"),
        arg("attention"), arg("threads"), no_gil);
    m.def(
        "mlp_fwd",
        [](Address out, const MlpSaved& saved, Address x, Address base, const Mlp& mlp,
           int threads) {
            kernels().mlp_fwd(at<float>(out), saved, at<const float>(x), at<const float>(base), mlp,
                              threads);
        },
        py::kw_only(), arg("out"), arg("saved"), arg("x"), arg("base"), arg("mlp"), arg("threads"),
        no_gil);
    m.def(
        "mlp_bwd",
        [](Address grad_x, bool x_is_base, const MlpGrad& grad, Address grad_out,
           const MlpSaved& saved, Address x, const Mlp& mlp, int threads) {
            kernels().mlp_bwd(at<float>(grad_x), x_is_base, grad, at<const float>(grad_out), saved,
                              at<const float>(x), mlp, threads);
        },
        py::kw_only(), arg("grad_x"), arg("x_is_base"), arg("grad"), arg("grad_out"), arg("saved"),
        arg("x"), arg("mlp"), arg("threads"), no_gil);
    m.def(
        "norm_fwd",
        [](Address out, Address stats, Address sum, Address x, Address residual, int64_t rows,
           int64_t H, const Norm& norm, int threads) {
            kernels().norm_fwd(at<float>(out), at<float>(stats), at<float>(sum),
                               at<const float>(x), at<const float>(residual), rows, H, norm,
                               threads);
        },
        py::kw_only(), arg("out"), arg("stats"), arg("sum"), arg("x"), arg("residual"),
        arg("rows"), arg("H"), arg("norm"), arg("threads"), no_gil);
    m.def(
        "norm_bwd",
        [](Address grad_x, const NormGrad& grad, Address grad_out, Address sum, Address stats,
           int64_t rows, int64_t H, const Norm& norm, int threads) {
            kernels().norm_bwd(at<float>(grad_x), grad, at<const float>(grad_out),
                               at<const float>(sum), at<const float>(stats), rows, H, norm,
                               threads);
        },
        py::kw_only(), arg("grad_x"), arg("grad"), arg("grad_out"), arg("sum"), arg("stats"),
        arg("rows"), arg("H"), arg("norm"), arg("threads"), no_gil);
    m.def(
        "embedding_fwd",
        [](Address out, const Embedding& embedding, int threads) {
            kernels().embedding_fwd(at<float>(out), embedding, threads);
        },
        py::kw_only(), arg("out"), arg("embedding"), arg("threads"), no_gil);
    m.def(
        "embedding_bwd",
        [](Address grad_weight, Address grad_positions, Address grad_out, int64_t padding_idx,
           const Embedding& embedding, int threads) {
            kernels().embedding_bwd(at<float>(grad_weight), at<float>(grad_positions),
                                    at<const float>(grad_out), padding_idx, embedding, threads);
        },
        py::kw_only(), arg("grad_weight"), arg("grad_positions"), arg("grad_out"),
        arg("padding_idx"), arg("embedding"), arg("threads"), no_gil);
    m.def(
        "linear_cross_entropy",
        [](Address grad_x, const LinearGrad& grad, Address x, const LinearCrossEntropy& entropy,
           int threads) {
            return kernels().linear_cross_entropy(at<float>(grad_x), grad, at<const float>(x),
                                                  entropy, threads);
        },
        py::kw_only(), arg("grad_x"), arg("grad"), arg("x"), arg("entropy"), arg("threads"),
        no_gil);
    m.def("decoder_loss", decoder_loss, py::kw_only(), arg("decoder"), arg("batch"),
          arg("parameters"), arg("grads"), arg("threads"), no_gil);
    m.def(
        "dropout",
        [](Address out, Address x, int64_t size, double p, uint64_t seed, uint32_t stream,
           int threads) {
            kernels().dropout(at<float>(out), at<const float>(x), size, {p, seed, stream},
                              threads);
        },
        py::kw_only(), arg("out"), arg("x"), arg("size"), arg("p"), arg("seed"), arg("stream"),
        arg("threads"), no_gil);
    m.def(
        "sample",
        [](Address tokens, Address logits, int64_t B, int64_t V,
           const std::vector<Sampling>& samplings, Address seen,
           const std::vector<uint64_t>& seeds, const std::vector<uint64_t>& steps, int threads) {
            return kernels().sample(at<int64_t>(tokens), at<const float>(logits), B, V,
                                    samplings.data(), at<const uint8_t>(seen), seeds.data(),
                                    steps.data(), threads);
        },
        py::kw_only(), arg("tokens"), arg("logits"), arg("B"), arg("V"), arg("samplings"),
        arg("seen"), arg("seeds"), arg("steps"), arg("threads"), no_gil);
    m.def(
        "checksum",
        [](Address data, int64_t size, int threads) {
            return kernels().checksum(at<const float>(data), size, threads);
        },
        arg("data"), arg("size"), arg("threads"), no_gil);
    m.def(
        "fma_loop",
        [](int64_t iterations, int precision, int threads) {
            return kernels().fma_loop(iterations, static_cast<Precision>(precision), threads);
        },
        arg("iterations"), arg("precision"), arg("threads"), no_gil);
    m.def(
        "memory_read",
        [](Address data, int64_t size, int threads) {
            return kernels().memory_read(at<const float>(data), size, threads);
        },
        arg("data"), arg("size"), arg("threads"), no_gil);
    m.def(
        "memory_update",
        [](Address data, int64_t size, int threads) {
            kernels().memory_update(at<float>(data), size, threads);
        },
        arg("data"), arg("size"), arg("threads"), no_gil);
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "fastllm's CPU kernels on raw addresses; see csrc/kernels.h.";
    py::register_local_exception_translator(translate_out_of_memory);
    m.def("isas", isas, "The instruction sets with kernels that this CPU can run, slowest first.");
    m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
    m.def("set_isa", set_isa, arg("isa"));
    m.def("native_bf16", [] { return kernels().native_bf16; },
          "Whether bf16 products are faster than fp32 ones with that instruction set.");
    m.def("scratch_bytes", [] { return kernels().scratch_bytes(); },
          "Bytes of working memory that all threads hold between calls.");
    m.def("limit_scratch", [](int64_t bytes) { kernels().limit_scratch(bytes); }, arg("bytes"),
          "For tests: refuse working memory beyond this.");
    py::class_<Memory>(m, "Memory", py::buffer_protocol(),
                       "Bytes whose memory is kept for the next object of the same size.")
        .def(py::init<size_t>(), arg("size"))
        .def_buffer([](Memory& memory) {
            return py::buffer_info(static_cast<uint8_t*>(memory.data()),
                                   static_cast<py::ssize_t>(memory.size()));
        });
    define_records(m);
    define_decoding(m);
    define_kernels(m);
}
