// One vector register of whatever width the instruction set has, through the GCC/Clang vector
// extensions: arithmetic is written with plain operators.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
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

inline void store(float* to, vec v) { __builtin_memcpy(to, &v, sizeof v); }

inline double sum(vec v) {
    double total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += v[lane];
    return total;
}

typedef uint32_t words_vec __attribute__((vector_size(LANES * sizeof(uint32_t))));

// The same integers, seen as the halves of 64-bit ones.
typedef uint64_t pairs __attribute__((vector_size(LANES * sizeof(float))));

constexpr uint64_t HIGH_HALVES = 0xFFFFFFFF00000000;

inline pairs both_halves(uint32_t x) { return (x | uint64_t{x} << 32) - pairs{}; }

// Products of the low halves. The plain operator would multiply all 64 bits, three times as slow.
inline pairs multiply_low_halves(pairs a, pairs b) {
#if defined(__AVX512F__)
    return (pairs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (pairs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (pairs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & ~HIGH_HALVES) * (b & ~HIGH_HALVES);
#endif
}

}  // namespace
