// A decoder that owns its records, its packed weights, and sequences that continue with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace fastllm {

// The input of one loss of a decoder.
struct Batch {
    int64_t B, S;
    const int64_t *ids, *labels;  // [B, S]
    int64_t ignore_index;
    Mask mask;
    // Of the embedding; then of each layer: attention weights, attention output, MLP hidden, MLP
    // output.
    std::vector<Dropout> dropouts;
    Precision precision;
};

// A Decoder together with the array of its layers.
struct OwnedDecoder {
    OwnedDecoder(const Embedding& embedding, std::vector<Layer> all, const Norm& norm,
                 const LinearCrossEntropy& head, int64_t padding_idx)
        : layers(std::move(all)),
          decoder{embedding, layers.data(), static_cast<int64_t>(layers.size()),
                  norm,      head,          padding_idx} {}
    OwnedDecoder(const OwnedDecoder& other)
        : OwnedDecoder(other.decoder.embedding, other.layers, other.decoder.norm,
                       other.decoder.head, other.decoder.padding_idx) {}

    // The same model with the sizes, dropouts and precision of a batch.
    OwnedDecoder for_batch(const Batch& batch) const {
        OwnedDecoder result = *this;
        auto dropout = batch.dropouts.begin();
        const auto next = [&] {
            if (dropout == batch.dropouts.end())
                throw std::invalid_argument("the batch has fewer dropouts than the decoder");
            return *dropout++;
        };
        Embedding& embedding = result.decoder.embedding;
        embedding.B = batch.B;
        embedding.S = batch.S;
        embedding.ids = batch.ids;
        embedding.dropout = next();
        for (auto& [attention, mlp, parallel] : result.layers) {
            attention.B = batch.B;
            attention.S = batch.S;
            attention.mask = batch.mask;
            attention.weights_dropout = next();
            attention.out_dropout = next();
            attention.precision = batch.precision;
            mlp.rows = batch.B * batch.S;
            mlp.hidden_dropout = next();
            mlp.out_dropout = next();
            mlp.precision = batch.precision;
        }
        LinearCrossEntropy& head = result.decoder.head;
        head.rows = batch.B * batch.S;
        head.targets = batch.labels;
        head.ignore_index = batch.ignore_index;
        head.precision = batch.precision;
        return result;
    }

    std::vector<Layer> layers;
    Decoder decoder;
};

// The size of memory for this many floats, never 0.
inline size_t float_bytes(int64_t floats) { return (floats + 1) * sizeof(float); }

// Throws if an id is outside [0, vocabulary), unless it is `allowed`.
inline void check_ids(const int64_t* ids, int64_t size, int64_t vocabulary,
                      std::optional<int64_t> allowed = {}) {
    for (int64_t i = 0; i < size; ++i)
        if ((ids[i] < 0 || ids[i] >= vocabulary) && ids[i] != allowed)
            throw std::out_of_range("Token id " + std::to_string(ids[i]) +
                                    " is outside the vocabulary of " + std::to_string(vocabulary) +
                                    " tokens");
}

// A snapshot of a decoder for decoding, with the weights of its linear layers packed. Only the token
// embeddings are read from the model's own memory, which the caller keeps alive.
class PackedDecoder {
public:
    PackedDecoder(const Kernels& kernels, const OwnedDecoder& from, Precision precision,
                  int threads)
        : kernels(kernels), precision(precision), decoder_(from) {
        std::deque<std::vector<float>> joined;  // until they are packed
        for (auto& layer : decoder_.layers) join(layer.attention, joined);
        weights_.emplace(float_bytes(kernels.decode_weights_size(decoder_.decoder, precision)));
        kernels.decode_pack(weights_->floats(), decoder_.decoder, precision, threads);
        Decoder& d = decoder_.decoder;
        const int64_t H = d.embedding.H;
        own(d.embedding.positions, d.embedding.S * H);
        for (auto& [attention, mlp, parallel] : decoder_.layers) {
            const int64_t widths = (attention.N + 2 * attention.K) * attention.D;
            own(attention.norm, H);
            own(attention.qkv[0], widths);
            own(attention.out, H);
            own(attention.q_norm, attention.D);
            own(attention.k_norm, attention.D);
            own(attention.out_norm, H);
            own(attention.rope.table, d.embedding.S * attention.rope.size);
            own(mlp.norm, H);
            own(mlp.out_norm, H);
            own(mlp.fc1, mlp.I);
            own(mlp.fc2, H);
            own(mlp.up, mlp.I);
        }
        own(d.norm, H);
        own(d.head.head, d.head.V);
    }
    PackedDecoder(const PackedDecoder&) = delete;

    const Decoder& model() const { return decoder_.decoder; }
    const float* weights() const { return weights_->floats(); }

    const Kernels& kernels;  // whose layout the weights are packed in
    const Precision precision;

private:
    // Layers that share a table share its copy.
    void own(const float*& data, int64_t size) {
        if (!data) return;
        const auto [copy, is_new] = copied_.try_emplace(data, nullptr);
        if (is_new) copy->second = copies_.emplace_back(data, data + size).data();
        data = copy->second;
    }
    void own(Norm& norm, int64_t size) {
        own(norm.weight, size);
        own(norm.bias, size);
    }
    void own(Linear& linear, int64_t outputs) {
        linear.weight = nullptr;  // it was packed, and may not live as long
        own(linear.bias, outputs);
    }

    // One linear layer in place of three for q, k and v.
    void join(MultiHeadAttention& a, std::deque<std::vector<float>>& joined) {
        if (!a.separate) return;
        const int64_t widths[] = {a.N * a.D, a.K * a.D, a.K * a.D};
        std::vector<float>&weight = joined.emplace_back(), &bias = copies_.emplace_back();
        bool biased = false;
        for (int i = 0; i < 3; ++i) {
            const Linear& part = a.qkv[i];
            weight.insert(weight.end(), part.weight, part.weight + widths[i] * a.H);
            const size_t end = bias.size() + widths[i];
            if (part.bias) bias.insert(bias.end(), part.bias, part.bias + widths[i]);
            bias.resize(end, 0);
            biased = biased || part.bias;
        }
        a.qkv[0] = {weight.data(), biased ? bias.data() : nullptr};
        a.separate = false;
    }

    OwnedDecoder decoder_;
    std::optional<Memory> weights_;
    std::deque<std::vector<float>> copies_;
    std::map<const float*, const float*> copied_;  // from the model's own memory
};

// Sequences that continue, each after its own cache. Threads take turns.
class DecodingState {
public:
    DecodingState(std::shared_ptr<const PackedDecoder> packed, int64_t B, int64_t capacity)
        : packed_(std::move(packed)), caches_(B), cache_addresses_(B), lengths_(B, 0),
          previously_(B, 0) {
        const int64_t positions = packed_->model().embedding.S;
        if (capacity > positions)
            throw std::invalid_argument("the capacity of " + std::to_string(capacity) +
                                        " tokens exceeds the model's " +
                                        std::to_string(positions) + " positions");
        decoding_ = {&packed_->model(), packed_->weights(), packed_->precision,
                     B,                 capacity,           cache_addresses_.data()};
        drops_keys_ = decoding_.drops_keys();
    }
    DecodingState(const DecodingState&) = delete;

    // Appends tokens to each sequence, and writes rows of logits for the sequences that got any: one
    // row after the other, or with `in_place` each in the row of its sequence. With `every`, a row
    // for every token.
    void extend(const std::vector<std::vector<int64_t>>& tokens, float* logits, bool in_place,
                bool every, int threads) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (tokens.size() != lengths_.size())
            throw std::invalid_argument("there are " + std::to_string(lengths_.size()) +
                                        " sequences, got tokens for " +
                                        std::to_string(tokens.size()));
        int64_t longest = 0, rows = 0;
        std::vector<int64_t> places;  // of each sequence's first row of logits
        for (size_t b = 0; b < tokens.size(); ++b) {
            const auto count = static_cast<int64_t>(tokens[b].size());
            if (lengths_[b] + count > decoding_.capacity)
                throw std::invalid_argument(
                    "Sequence length " + std::to_string(lengths_[b] + count) +
                    " exceeds maximum sequence length " + std::to_string(decoding_.capacity));
            check_ids(tokens[b].data(), count, packed_->model().embedding.V);
            places.push_back(in_place ? static_cast<int64_t>(b) : rows);
            rows += every ? count : count > 0;
            longest = std::max(longest, count);
        }
        for (size_t b = 0; b < tokens.size(); ++b) {
            if (tokens[b].empty() || caches_[b]) continue;
            caches_[b].emplace(float_bytes(packed_->kernels.decode_cache_size(decoding_)));
            cache_addresses_[b] = caches_[b]->floats();
        }
        const int64_t step = drops_keys_ ? Decoding::STEP : longest;
        for (int64_t first = 0; first < longest; first += step)
            extend_by(tokens, first, step, places, logits, every, threads);
    }

    // Restarts the sequence.
    void clear(int64_t sequence) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto B = static_cast<int64_t>(lengths_.size());
        if (sequence < 0 || sequence >= B)
            throw std::out_of_range("there is no sequence " + std::to_string(sequence) +
                                    " among " + std::to_string(B));
        lengths_[sequence] = previously_[sequence] = 0;
    }

    // Memory for the keys and values of each sequence.
    int64_t cache_bytes() const {
        return packed_->kernels.decode_cache_size(decoding_) * static_cast<int64_t>(sizeof(float));
    }

    std::vector<int64_t> lengths() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return lengths_;
    }

private:
    // Appends tokens [first, first + step) of each sequence that has as many.
    void extend_by(const std::vector<std::vector<int64_t>>& tokens, int64_t first, int64_t step,
                   const std::vector<int64_t>& places, float* logits, bool every, int threads) {
        std::vector<int64_t> ids, counts;
        std::vector<Scored> scored;
        for (size_t b = 0; b < tokens.size(); ++b) {
            const auto size = static_cast<int64_t>(tokens[b].size());
            const int64_t begin = std::min(first, size), end = std::min(first + step, size);
            counts.push_back(end - begin);
            for (int64_t i = begin; i < end; ++i) {
                if (every || i == size - 1)
                    scored.push_back({static_cast<int64_t>(ids.size()), places[b] + (every ? i : 0)});
                ids.push_back(tokens[b][i]);
            }
        }
        try {
            packed_->kernels.decode(logits, decoding_, ids.data(), counts.data(), lengths_.data(),
                                    previously_.data(), scored.data(), scored.size(), threads);
        } catch (...) {  // some layers may have dropped keys
            for (size_t b = 0; b < counts.size(); ++b)
                if (drops_keys_ && counts[b]) lengths_[b] = previously_[b] = 0;
            throw;
        }
        for (size_t b = 0; b < counts.size(); ++b) {
            if (counts[b] == 0) continue;
            previously_[b] = lengths_[b];
            lengths_[b] += counts[b];
        }
    }

    std::mutex mutex_;
    std::shared_ptr<const PackedDecoder> packed_;
    Decoding decoding_;
    std::vector<std::optional<Memory>> caches_;  // of the sequences that had tokens
    std::vector<float*> cache_addresses_;
    std::vector<int64_t> lengths_, previously_;  // previously_: before the last tokens came
    bool drops_keys_;
};

}  // namespace fastllm
