// What threads.cpp does for the kernels.
#pragma once

#include <cstdint>

namespace fastllm {

// body(context, i) for every i of [0, count), taken in order by whichever of `threads` threads is
// free, the caller being one of them. Any thread may call, several at once too.
void run_shared(int64_t count, int threads, void (*body)(void*, int64_t), void* context);

}  // namespace fastllm
