// The extension module fastllm._kernels: picks the table for this processor and calls it on raw
// addresses. Device, dtype, shape and strides were checked in Python; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace fastllm;

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
    if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&kernels_avx512_bf16);
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

// A free list keyed by exact size, because fresh pages of a large array cost more than filling
// them. A miss frees the whole list, so idle memory never exceeds one step's.
class Memory {
public:
    explicit Memory(size_t size) : size_(size), data_(take(size)) {
#if defined(FASTLLM_POISON)
        std::memset(data_, 0xFF, size);  // NaN: reads of unwritten memory show
#endif
    }
    ~Memory() {
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            idle_.emplace(size_, data_);
        } catch (const std::exception&) {  // no memory for the list's entry
            std::free(data_);
        }
    }
    Memory(const Memory&) = delete;

    float* floats() { return static_cast<float*>(data_); }
    py::buffer_info buffer() {
        return {static_cast<uint8_t*>(data_), static_cast<py::ssize_t>(size_)};
    }

private:
    static inline std::mutex mutex_;
    static inline std::multimap<size_t, void*> idle_;

    static constexpr size_t PAGE = 2 * 1024 * 1024;  // a large one

    static void* take(size_t size) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (const auto found = idle_.find(size); found != idle_.end()) {
            void* data = found->second;
            idle_.erase(found);
            return data;
        }
        for (const auto& [idle_size, data] : idle_) std::free(data);
        idle_.clear();
        void* data = std::aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
        if (!data) throw OutOfMemory{static_cast<int64_t>(size)};
#if defined(__linux__)
        madvise(data, size, MADV_HUGEPAGE);  // a hint; failure costs nothing
#endif
        return data;
    }

    size_t size_;
    void* data_;
};

template <typename T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

// What stands for the structures of kernels.h in Python: addresses (0 for null) and numbers, in the
// order of the fields.
using PyNorm = std::tuple<uint64_t, uint64_t, float>;             // weight, bias, eps
using PyPair = std::pair<uint64_t, uint64_t>;                     // weight, bias
using PyLinear = std::tuple<uint64_t, uint64_t, bool>;            // weight, bias, transposed
using PyDropout = std::pair<double, uint64_t>;                    // probability, seed
using PyMask = std::pair<uint64_t, std::array<int64_t, 4>>;       // address, strides
using PyRows = std::pair<uint64_t, std::array<int64_t, 3>>;       // address, strides

Norm norm_of(const PyNorm& norm) {
    const auto& [weight, bias, eps] = norm;
    return {at<const float>(weight), at<const float>(bias), eps};
}
Linear linear_of(const PyLinear& linear) {
    const auto& [weight, bias, transposed] = linear;
    return {at<const float>(weight), at<const float>(bias), transposed};
}
NormGrad norm_grad_of(const PyPair& pair) { return {at<float>(pair.first), at<float>(pair.second)}; }
LinearGrad linear_grad_of(const PyPair& pair) {
    return {at<float>(pair.first), at<float>(pair.second)};
}
Mask mask_of(const PyMask& mask) {
    const auto& s = mask.second;
    return {at<const uint8_t>(mask.first), {s[0], s[1], s[2], s[3]}};
}
Rows rows_of(const PyRows& rows) {
    const auto& s = rows.second;
    return {at<const float>(rows.first), {s[0], s[1], s[2]}};
}

// lr, beta1, beta2, eps, weight_decay
using AdamSettings = std::array<double, 5>;
// param, grad, exp_avg, exp_avg_sq, step, size, index into the settings
using AdamRow = std::array<uint64_t, 7>;

double adam_step(const std::vector<AdamRow>& rows, const std::vector<AdamSettings>& settings,
                 bool decoupled_weight_decay, double max_grad_norm, int threads) {
    std::vector<AdamTensor> tensors;
    tensors.reserve(rows.size());
    int64_t blocks = 0;
    for (const auto& [param, grad, exp_avg, exp_avg_sq, step, size, group] : rows) {
        const auto& [lr, beta1, beta2, eps, weight_decay] = settings.at(group);
        tensors.push_back({at<float>(param), at<const float>(grad), at<float>(exp_avg),
                           at<float>(exp_avg_sq), at<float>(step), static_cast<int64_t>(size),
                           blocks, lr, beta1, beta2, eps, weight_decay, 0, 0});
        blocks += (static_cast<int64_t>(size) + ADAM_BLOCK - 1) / ADAM_BLOCK;
    }
    std::vector<double> block_sums(blocks);
    py::gil_scoped_release release;
    return kernels().adam_step(tensors.data(), tensors.size(), block_sums.data(), blocks,
                               decoupled_weight_decay, max_grad_norm, threads);
}

// B, N, S, T, D; q, k, v; mask, causal, dropout
using PyAttention =
    std::tuple<std::array<int64_t, 5>, std::array<PyRows, 3>, PyMask, bool, PyDropout>;

Attention attention_of(const PyAttention& attention) {
    const auto& [sizes, rows, mask, causal, dropout] = attention;
    const auto& [B, N, S, T, D] = sizes;
    return {B, N, S, T, D, rows_of(rows[0]), rows_of(rows[1]), rows_of(rows[2]), mask_of(mask),
            causal, dropout.first, {dropout.second, 0}};
}

// B, S, N, D; starts; norm, norm_first; qkv, out; mask, causal; dropout of the weights and of the
// output; precision
using PyMultiHeadAttention = std::tuple<std::array<int64_t, 4>, uint64_t, PyNorm, bool, PyLinear,
                                        PyLinear, PyMask, bool, PyDropout, PyDropout, int>;

MultiHeadAttention multi_head_attention_of(const PyMultiHeadAttention& attention) {
    const auto& [sizes, starts, norm, norm_first, qkv, out, mask, causal, weights, output,
                 precision] = attention;
    const auto& [B, S, N, D] = sizes;
    return {B, S, N, D, at<const int64_t>(starts), norm_of(norm), norm_first, linear_of(qkv),
            linear_of(out), mask_of(mask), causal, weights.first, output.first,
            {weights.second, 0}, {output.second, 0}, static_cast<Precision>(precision)};
}

// stats, qkv, attn_out, residual
using PyMultiHeadAttentionSaved = std::array<uint64_t, 4>;

MultiHeadAttentionSaved multi_head_attention_saved_of(const PyMultiHeadAttentionSaved& saved) {
    const auto& [stats, qkv, attn_out, residual] = saved;
    return {at<float>(stats), at<float>(qkv), at<float>(attn_out), at<float>(residual)};
}

// rows, H, I; norm, norm_first; fc1, fc2; activation; dropout of the activations and of the output;
// precision
using PyMlp = std::tuple<std::array<int64_t, 3>, PyNorm, bool, PyLinear, PyLinear, int, PyDropout,
                         PyDropout, int>;

Mlp mlp_of(const PyMlp& mlp) {
    const auto& [sizes, norm, norm_first, fc1, fc2, activation, hidden, output, precision] = mlp;
    const auto& [rows, H, I] = sizes;
    return {rows, H, I, norm_of(norm), norm_first, linear_of(fc1), linear_of(fc2),
            static_cast<Activation>(activation), hidden.first, output.first, {hidden.second, 0},
            {output.second, 0}, static_cast<Precision>(precision)};
}

// stats, hidden, residual
using PyMlpSaved = std::array<uint64_t, 3>;

MlpSaved mlp_saved_of(const PyMlpSaved& saved) {
    return {at<float>(saved[0]), at<float>(saved[1]), at<float>(saved[2])};
}

// B, S, H, V; ids, weight, positions; scale; dropout
using PyEmbedding =
    std::tuple<std::array<int64_t, 4>, std::array<uint64_t, 3>, float, PyDropout>;

Embedding embedding_of(const PyEmbedding& embedding) {
    const auto& [sizes, addresses, scale, dropout] = embedding;
    const auto& [B, S, H, V] = sizes;
    return {B, S, H, V, at<const int64_t>(addresses[0]), at<const float>(addresses[1]),
            at<const float>(addresses[2]), scale, dropout.first, {dropout.second, 0}};
}

// rows, H, V; targets; ignore_index; head; precision
using PyLinearCrossEntropy =
    std::tuple<std::array<int64_t, 3>, uint64_t, int64_t, PyLinear, int>;

LinearCrossEntropy linear_cross_entropy_of(const PyLinearCrossEntropy& entropy) {
    const auto& [sizes, targets, ignore_index, head, precision] = entropy;
    const auto& [rows, H, V] = sizes;
    return {rows, H, V, at<const int64_t>(targets), ignore_index, linear_of(head),
            static_cast<Precision>(precision)};
}

void check_ids(const int64_t* ids, int64_t size, int64_t vocabulary,
               std::optional<int64_t> allowed = {}) {
    for (int64_t i = 0; i < size; ++i)
        if ((ids[i] < 0 || ids[i] >= vocabulary) && ids[i] != allowed)
            throw py::index_error("Token id " + std::to_string(ids[i]) +
                                  " is outside the vocabulary of " + std::to_string(vocabulary) +
                                  " tokens");
}

using PyLayers = std::vector<std::pair<PyMultiHeadAttention, PyMlp>>;
// Gradients: of embedding and positions; of each layer: norm, qkv, out; norm, fc1, fc2; of the final
// norm; of the head
using PyDecoderGrad =
    std::tuple<PyPair, std::vector<std::array<PyPair, 6>>, PyPair, PyPair>;

double decoder_loss(const PyEmbedding& embedding, const PyLayers& layers, const PyNorm& norm,
                    const PyLinearCrossEntropy& head, int64_t padding_idx,
                    const std::optional<PyDecoderGrad>& grads, int threads) {
    std::vector<Layer> all_layers;
    for (const auto& [attention, mlp] : layers)
        all_layers.push_back({multi_head_attention_of(attention), mlp_of(mlp)});
    const Decoder decoder = {embedding_of(embedding), all_layers.data(),
                             static_cast<int64_t>(all_layers.size()), norm_of(norm),
                             linear_cross_entropy_of(head), padding_idx};
    const Embedding& e = decoder.embedding;
    check_ids(e.ids, e.B * e.S, e.V);
    for (int64_t b = 0; b < e.B; ++b)  // a sequence's first label is no target
        check_ids(decoder.head.targets + b * e.S + 1, e.S - 1, decoder.head.V,
                  decoder.head.ignore_index);
    std::vector<LayerGrad> layer_grads;
    DecoderGrad grad = {};
    if (grads) {
        const auto& [inputs, layer_pairs, norm_pair, head_pair] = *grads;
        for (const auto& [norm1, qkv, out, norm2, fc1, fc2] : layer_pairs)
            layer_grads.push_back(
                {{norm_grad_of(norm1), linear_grad_of(qkv), linear_grad_of(out)},
                 {norm_grad_of(norm2), linear_grad_of(fc1), linear_grad_of(fc2)}});
        grad = {at<float>(inputs.first), at<float>(inputs.second), layer_grads.data(),
                norm_grad_of(norm_pair), linear_grad_of(head_pair)};
    }
    py::gil_scoped_release release;
    return kernels().decoder_loss(decoder, grads ? &grad : nullptr, threads);
}

// kernels.h's Decoding with all that it needs, but for the embeddings, biases and norms: these are
// read where they lie, and whoever makes it keeps them there. Threads take turns.
class PyDecoding {
public:
    PyDecoding(const PyEmbedding& embedding, const PyLayers& layers, const PyNorm& norm,
               const PyLinearCrossEntropy& head, int precision, int64_t B, int64_t capacity,
               int threads)
        : kernels_(&kernels()), lengths_(B, 0) {
        for (const auto& [attention, mlp] : layers)
            layers_.push_back({multi_head_attention_of(attention), mlp_of(mlp)});
        model_ = {embedding_of(embedding), layers_.data(), static_cast<int64_t>(layers_.size()),
                  norm_of(norm), linear_cross_entropy_of(head), -1};
        caches_.resize(B);
        caches_at_.resize(B);
        decoding_ = {&model_, nullptr, static_cast<Precision>(precision), B, capacity,
                     caches_at_.data()};
        weights_ = take(kernels_->decode_weights_size(model_, decoding_.precision));
        decoding_.weights = weights_->floats();
        const py::gil_scoped_release release;
        kernels_->decode_pack(weights_->floats(), model_, decoding_.precision, threads);
    }
    PyDecoding(const PyDecoding&) = delete;

    // Appends tokens to each sequence, and writes rows of logits for those that were given any: one
    // row after the other, or each in the row of its sequence. With `every`, a row for every token.
    void extend(const std::vector<std::vector<int64_t>>& tokens, uint64_t logits, bool in_place,
                bool every, int threads) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (tokens.size() != lengths_.size())
            throw std::invalid_argument("there are " + std::to_string(lengths_.size()) +
                                        " sequences, got tokens for " +
                                        std::to_string(tokens.size()));
        std::vector<int64_t> ids, counts;
        std::vector<Scored> scored;
        for (size_t b = 0; b < tokens.size(); ++b) {
            const auto count = static_cast<int64_t>(tokens[b].size());
            if (lengths_[b] + count > decoding_.capacity)
                throw std::invalid_argument(
                    "Sequence length " + std::to_string(lengths_[b] + count) +
                    " exceeds maximum sequence length " + std::to_string(decoding_.capacity));
            ids.insert(ids.end(), tokens[b].begin(), tokens[b].end());
            counts.push_back(count);
            const auto end = static_cast<int64_t>(ids.size());
            for (int64_t row = every ? end - count : end - (count > 0); row < end; ++row) {
                const auto place = static_cast<int64_t>(in_place ? b : scored.size());
                scored.push_back({row, place});
            }
        }
        check_ids(ids.data(), ids.size(), model_.embedding.V);
        if (ids.empty()) return;
        for (size_t b = 0; b < counts.size(); ++b) {
            if (counts[b] == 0 || caches_[b]) continue;
            caches_[b] = take(kernels_->decode_cache_size(decoding_));
            caches_at_[b] = caches_[b]->floats();
        }
        kernels_->decode(at<float>(logits), decoding_, ids.data(), counts.data(), lengths_.data(),
                         scored.data(), scored.size(), threads);
        for (size_t b = 0; b < counts.size(); ++b) lengths_[b] += counts[b];
    }

    // The sequence begins anew.
    void clear(int64_t sequence) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto B = static_cast<int64_t>(lengths_.size());
        if (sequence < 0 || sequence >= B)
            throw py::index_error("there is no sequence " + std::to_string(sequence) + " among " +
                                  std::to_string(B));
        lengths_[sequence] = 0;
    }

    std::vector<int64_t> lengths() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return lengths_;
    }

private:
    static std::unique_ptr<Memory> take(int64_t floats) {
        return std::make_unique<Memory>((floats + 1) * sizeof(float));  // there may be none
    }

    std::mutex mutex_;
    const Kernels* kernels_;  // whose layout the weights are packed in
    std::vector<Layer> layers_;
    Decoder model_;
    Decoding decoding_;
    std::unique_ptr<Memory> weights_;
    std::vector<std::unique_ptr<Memory>> caches_;  // of who had tokens
    std::vector<float*> caches_at_;
    std::vector<int64_t> lengths_;
};

void translate_out_of_memory(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const OutOfMemory& refused) {
        const std::string message = "the system refused " + std::to_string(refused.bytes) +
                                    " bytes of memory for the C++ kernels";
        py::set_error(PyExc_MemoryError, message.c_str());
    }
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "fastllm's CPU kernels on raw addresses; see csrc/kernels.h.";
    py::register_local_exception_translator(translate_out_of_memory);
    m.def("isas", isas, "The instruction sets with kernels that this CPU can run, slowest first.");
    m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
    m.def("set_isa", set_isa, py::arg("isa"));
    m.def("native_bf16", [] { return kernels().native_bf16; },
          "Whether bf16 products are faster than fp32 ones with that instruction set.");
    m.def("scratch_bytes", [] { return kernels().scratch_bytes(); },
          "Bytes of working memory that all threads hold between calls.");
    m.def("limit_scratch", [](int64_t bytes) { kernels().limit_scratch(bytes); }, py::arg("bytes"),
          "For tests: refuse working memory beyond this.");
    py::class_<Memory>(m, "Memory", py::buffer_protocol(),
                       "Bytes whose memory is reused for the next Memory of the same size.")
        .def(py::init<size_t>(), py::arg("size"))
        .def_buffer(&Memory::buffer);
    py::class_<PyDecoding>(m, "Decoding", "Sequences that a decoder model continues.")
        .def(py::init<const PyEmbedding&, const PyLayers&, const PyNorm&,
                      const PyLinearCrossEntropy&, int, int64_t, int64_t, int>(),
             py::arg("embedding"), py::arg("layers"), py::arg("norm"), py::arg("head"),
             py::arg("precision"), py::arg("B"), py::arg("capacity"), py::arg("threads"))
        .def("extend", &PyDecoding::extend, py::arg("tokens"), py::arg("logits"),
             py::arg("in_place"), py::arg("every"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>())
        .def("clear", &PyDecoding::clear, py::arg("sequence"),
             py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("lengths",
                               py::cpp_function(&PyDecoding::lengths,
                                                py::call_guard<py::gil_scoped_release>()));
    m.def("adam_step", adam_step, py::arg("rows"), py::arg("settings"),
          py::arg("decoupled_weight_decay"), py::arg("max_grad_norm"), py::arg("threads"));
    m.def(
        "attention_fwd",
        [](uint64_t out, const PyAttention& attention, int threads) {
            kernels().attention_fwd(at<float>(out), attention_of(attention), threads);
        },
        py::arg("out"), py::arg("attention"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "attention_bwd",
        [](const std::array<uint64_t, 3>& grads, uint64_t grad_out, const PyAttention& attention,
           int threads) {
            kernels().attention_bwd(at<float>(grads[0]), at<float>(grads[1]), at<float>(grads[2]),
                                   at<const float>(grad_out), attention_of(attention), threads);
        },
        py::arg("grads"), py::arg("grad_out"), py::arg("attention"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "multi_head_attention_fwd",
        [](uint64_t out, const PyMultiHeadAttentionSaved& saved, uint64_t x,
           const PyMultiHeadAttention& attention, int threads) {
            kernels().multi_head_attention_fwd(at<float>(out), multi_head_attention_saved_of(saved),
                                              at<const float>(x),
                                              multi_head_attention_of(attention), threads);
        },
        py::arg("out"), py::arg("saved"), py::arg("x"), py::arg("attention"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "multi_head_attention_bwd",
        [](uint64_t grad_x, const std::array<PyPair, 3>& grads, uint64_t grad_out,
           const PyMultiHeadAttentionSaved& saved, uint64_t x, const PyMultiHeadAttention& attention,
           int threads) {
            kernels().multi_head_attention_bwd(
                at<float>(grad_x),
                {norm_grad_of(grads[0]), linear_grad_of(grads[1]), linear_grad_of(grads[2])},
                at<const float>(grad_out), multi_head_attention_saved_of(saved), at<const float>(x),
                multi_head_attention_of(attention), threads);
        },
        py::arg("grad_x"), py::arg("grads"), py::arg("grad_out"), py::arg("saved"), py::arg("x"),
        py::arg("attention"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "mlp_fwd",
        [](uint64_t out, const PyMlpSaved& saved, uint64_t x, const PyMlp& mlp, int threads) {
            kernels().mlp_fwd(at<float>(out), mlp_saved_of(saved), at<const float>(x), mlp_of(mlp),
                             threads);
        },
        py::arg("out"), py::arg("saved"), py::arg("x"), py::arg("mlp"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "mlp_bwd",
        [](uint64_t grad_x, const std::array<PyPair, 3>& grads, uint64_t grad_out,
           const PyMlpSaved& saved, uint64_t x, const PyMlp& mlp, int threads) {
            kernels().mlp_bwd(
                at<float>(grad_x),
                {norm_grad_of(grads[0]), linear_grad_of(grads[1]), linear_grad_of(grads[2])},
                at<const float>(grad_out), mlp_saved_of(saved), at<const float>(x), mlp_of(mlp),
                threads);
        },
        py::arg("grad_x"), py::arg("grads"), py::arg("grad_out"), py::arg("saved"), py::arg("x"),
        py::arg("mlp"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "layer_norm_fwd",
        [](uint64_t out, uint64_t stats, uint64_t sum, uint64_t x, uint64_t residual, int64_t rows,
           int64_t H, const PyNorm& norm, int threads) {
            kernels().layer_norm_fwd(at<float>(out), at<float>(stats), at<float>(sum),
                                    at<const float>(x), at<const float>(residual), rows, H,
                                    norm_of(norm), threads);
        },
        py::arg("out"), py::arg("stats"), py::arg("sum"), py::arg("x"), py::arg("residual"),
        py::arg("rows"), py::arg("H"), py::arg("norm"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "layer_norm_bwd",
        [](uint64_t grad_x, const PyPair& grad, uint64_t grad_out, uint64_t sum, uint64_t stats,
           int64_t rows, int64_t H, const PyNorm& norm, int threads) {
            kernels().layer_norm_bwd(at<float>(grad_x), norm_grad_of(grad),
                                    at<const float>(grad_out), at<const float>(sum),
                                    at<const float>(stats), rows, H, norm_of(norm), threads);
        },
        py::arg("grad_x"), py::arg("grad"), py::arg("grad_out"), py::arg("sum"), py::arg("stats"),
        py::arg("rows"), py::arg("H"), py::arg("norm"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "embedding_fwd",
        [](uint64_t out, const PyEmbedding& embedding, int threads) {
            kernels().embedding_fwd(at<float>(out), embedding_of(embedding), threads);
        },
        py::arg("out"), py::arg("embedding"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "embedding_bwd",
        [](uint64_t grad_weight, uint64_t grad_positions, uint64_t grad_out, int64_t padding_idx,
           const PyEmbedding& embedding, int threads) {
            kernels().embedding_bwd(at<float>(grad_weight), at<float>(grad_positions),
                                   at<const float>(grad_out), padding_idx,
                                   embedding_of(embedding), threads);
        },
        py::arg("grad_weight"), py::arg("grad_positions"), py::arg("grad_out"),
        py::arg("padding_idx"), py::arg("embedding"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "linear_cross_entropy",
        [](uint64_t grad_x, const PyPair& grad, uint64_t x, const PyLinearCrossEntropy& entropy,
           int threads) {
            return kernels().linear_cross_entropy(at<float>(grad_x), linear_grad_of(grad),
                                                 at<const float>(x),
                                                 linear_cross_entropy_of(entropy), threads);
        },
        py::arg("grad_x"), py::arg("grad"), py::arg("x"), py::arg("entropy"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def("decoder_loss", decoder_loss, py::arg("embedding"), py::arg("layers"), py::arg("norm"),
          py::arg("head"), py::arg("padding_idx"), py::arg("grads"), py::arg("threads"));
    m.def(
        "dropout",
        [](uint64_t out, uint64_t in, int64_t size, double p, uint64_t seed, uint32_t stream,
           int threads) {
            kernels().dropout(at<float>(out), at<const float>(in), size, p, {seed, stream}, threads);
        },
        py::arg("out"), py::arg("in"), py::arg("size"), py::arg("p"), py::arg("seed"),
        py::arg("stream"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "sample",
        [](uint64_t tokens, uint64_t logits, const std::pair<int64_t, int64_t>& sizes,
           const std::vector<std::tuple<double, int64_t, double, double, float>>& settings,
           uint64_t seen, const std::vector<uint64_t>& seeds, const std::vector<uint64_t>& steps,
           int threads) {
            std::vector<Sampling> each;
            for (const auto& [temperature, top_k, top_p, min_p, repetition_penalty] : settings)
                each.push_back({temperature, top_k, top_p, min_p, repetition_penalty});
            return kernels().sample(at<int64_t>(tokens), at<const float>(logits), sizes.first,
                                   sizes.second, each.data(), at<const uint8_t>(seen), seeds.data(),
                                   steps.data(), threads);
        },
        py::arg("tokens"), py::arg("logits"), py::arg("sizes"), py::arg("settings"),
        py::arg("seen"), py::arg("seeds"), py::arg("steps"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "fma_loop",
        [](int64_t iterations, int precision, int threads) {
            return kernels().fma_loop(iterations, static_cast<Precision>(precision), threads);
        },
        py::arg("iterations"), py::arg("precision"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "memory_read",
        [](uint64_t data, int64_t size, int threads) {
            return kernels().memory_read(at<const float>(data), size, threads);
        },
        py::arg("data"), py::arg("size"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "memory_update",
        [](uint64_t data, int64_t size, int threads) {
            kernels().memory_update(at<float>(data), size, threads);
        },
        py::arg("data"), py::arg("size"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}
