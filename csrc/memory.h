// Large arrays that Python or a decoding holds, kept for reuse.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>

#include "kernels.h"

namespace fastllm {

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

    size_t size() const { return size_; }
    void* data() const { return data_; }
    float* floats() const { return static_cast<float*>(data_); }

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

}  // namespace fastllm
