// One vector register of whatever width the instruction set has, through the GCC/Clang vector
// extensions: arithmetic is written with plain operators.
#pragma once

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));

inline vec splat(float x) { return x - vec{}; }

inline vec load(const float* from) {
    vec v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

inline double sum(vec v) {
    double total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += v[lane];
    return total;
}

}  // namespace
