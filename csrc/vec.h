// One vector register of the instruction set's width, through the GCC/Clang vector extensions:
// arithmetic uses plain operators, selection is `mask ? a : b`.
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
typedef int32_t ints __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t words __attribute__((vector_size(LANES * sizeof(float))));
// The same bits as half as many integers of twice the width.
typedef uint64_t pairs __attribute__((vector_size(LANES * sizeof(float))));

constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// x + offset, or null if x is null.
template <typename T>
inline T* at(T* x, int64_t offset) {
    return x ? x + offset : nullptr;
}

inline vec splat(float x) { return x - vec{}; }
inline words splat_word(uint32_t x) { return x - words{}; }

inline vec load(const float* from) {
    vec v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, vec v) { __builtin_memcpy(to, &v, sizeof v); }

inline words load(const uint32_t* from) {
    words w;
    __builtin_memcpy(&w, from, sizeof w);
    return w;
}

inline void store(uint32_t* to, words w) { __builtin_memcpy(to, &w, sizeof w); }

// The first `count` lanes from memory; the others are 0.
inline vec load(const float* from, int64_t count) {
    if (count == LANES) return load(from);
    vec v = {};
    __builtin_memcpy(&v, from, count * sizeof(float));
    return v;
}

inline void store(float* to, vec v, int64_t count) {
    if (count == LANES) return store(to, v);
    __builtin_memcpy(to, &v, count * sizeof(float));
}

// The first `count` lanes of v; the others are `rest`.
inline vec first(vec v, int32_t count, float rest = 0) {
    ints lane = {};
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane < count ? v : splat(rest);
}

// body(i, count) for each vector of an array of `size` elements; only the last may be short.
template <typename Body>
inline void each_vec(int64_t size, Body body) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) body(i, LANES);
    if (i < size) body(i, size - i);
}

inline vec max(vec a, vec b) { return a > b ? a : b; }

// Lane i becomes lane from[i] of a and b side by side; `from` is a compile-time constant.
inline vec shuffle(vec a, vec b, ints from) {
#if defined(__clang__)
    vec out = {};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) out[i] = from[i] < LANES ? a[from[i]] : b[from[i] - LANES];
    return out;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// Combines lanes pairwise, in four steps for sixteen lanes.
template <typename Combine>
inline float reduce(vec v, Combine combine) {
    float lanes[LANES];
    store(lanes, v);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
    return lanes[0];
}

inline float sum(vec v) {
    return reduce(v, [](float a, float b) { return a + b; });
}

inline float max(vec v) {
    return reduce(v, [](float a, float b) { return a > b ? a : b; });
}

// Turns rows into columns. Step d exchanges lanes with bit d in their index for rows with bit d in
// theirs.
inline void transpose(vec (&rows)[LANES]) {
#pragma GCC unroll 4
    for (int d = 1; d < LANES; d *= 2) {
        ints upper = {}, lower = {};
        for (int i = 0; i < LANES; ++i) {
            upper[i] = i & d ? LANES + i - d : i;
            lower[i] = i & d ? LANES + i : i + d;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) {
            if (i & d) continue;
            const vec a = rows[i], b = rows[i + d];
            rows[i] = shuffle(a, b, upper);
            rows[i + d] = shuffle(a, b, lower);
        }
    }
}

// bf16 is the upper half of fp32, rounded to nearest even. A word packs two of them, the first in
// its lower half.
inline vec lower_half(words pairs) { return (vec)(pairs << 16); }
inline vec upper_half(words pairs) { return (vec)(pairs & 0xFFFF0000); }

#if defined(__AVX512BF16__)
constexpr bool NATIVE_BF16 = true;

// sums + the products of both halves. On Arm, vbfdotq_f32 takes its operands in the same order.
inline vec add_dot(vec sums, words a, words b) {
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

// Word i packs elements 2 i and 2 i + 1 of the concatenation of a and b.
inline words narrow_neighbours(vec a, vec b) {
    return (words)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}

// Word i packs element i of both.
inline words narrow(vec lower, vec upper) {
    const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower);
    typedef uint16_t half_words __attribute__((vector_size(64)));
    half_words order = {};
    for (int i = 0; i < 32; ++i) order[i] = i / 2 + i % 2 * 16;
    return (words)_mm512_permutexvar_epi16((__m512i)order, halves);
}
#else
constexpr bool NATIVE_BF16 = false;

inline vec add_dot(vec sums, words a, words b) {
    return sums + lower_half(a) * lower_half(b) + upper_half(a) * upper_half(b);
}

inline words round_to_bf16(vec x) {
    const words bits = (words)x;
    const words rounded = bits + (0x7FFF + (bits >> 16 & 1));
    return x == x ? rounded : bits | 0x400000;  // keeps NaN with payload in the low bits only
}

inline words narrow(vec lower, vec upper) {
    return round_to_bf16(lower) >> 16 | (round_to_bf16(upper) & 0xFFFF0000);
}

inline words narrow_neighbours(vec a, vec b) {
    ints even = {}, odd = {};
    for (int i = 0; i < LANES; ++i) {
        even[i] = 2 * i;
        odd[i] = 2 * i + 1;
    }
    return narrow(shuffle(a, b, even), shuffle(a, b, odd));
}
#endif

// sums + the dot product of each word's four bytes, unsigned ones with signed ones.
inline ints add_dots(ints sums, words bytes, words signed_bytes) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)bytes, (__m512i)signed_bytes);
#elif defined(__SSE2__)
    // Even and odd bytes as 16-bit integers, whose products are summed in pairs.
    typedef int16_t shorts __attribute__((vector_size(LANES * sizeof(float))));
    const auto add = [&](words a, shorts b) {
#if defined(__AVX512F__)
        sums += (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
        sums += (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
        sums += (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
    };
    add(bytes & 0x00FF00FF, (shorts)(signed_bytes << 8) >> 8);
    add(bytes >> 8 & 0x00FF00FF, (shorts)signed_bytes >> 8);
    return sums;
#else
    for (int i = 0; i < 4; ++i)
        sums += (ints)(bytes >> 8 * i & 0xFF) * ((ints)(signed_bytes << (24 - 8 * i)) >> 24);
    return sums;
#endif
}

// 64-bit products of the low halves. The plain operator would multiply all 64 bits, three times as
// slow.
inline pairs multiply_low_halves(pairs a, pairs b) {
#if defined(__AVX512F__)
    return (pairs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (pairs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (pairs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    constexpr uint64_t LOW = 0xFFFFFFFF;
    return (a & LOW) * (b & LOW);
#endif
}

// e^x for x <= 0, to 2 units in the last place: Cody and Waite's reduction to |r| <= ln(2) / 2,
// with the polynomial of the Cephes library's expf. Subnormal results are flushed to 0.
inline vec exp_negative(vec x) {
    constexpr float LOWEST = -87.33654f;
    const vec magic = splat(12582912);  // 1.5 * 2^23: adding it rounds to an integer
    const vec inside = x < LOWEST ? splat(LOWEST) : x;
    const vec shifted = inside * 1.44269504f + magic;
    const vec n = shifted - magic;
    const vec r = inside - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1;
    // Multiply by 2^n through the exponent; the shift drops the magic number.
    const vec scaled = (vec)((words)p + ((words)shifted << 23));
    const vec bounded = x < LOWEST ? vec{} : scaled;
    return x == x ? bounded : x;  // the shift may have turned NaN into a number
}

// The hyperbolic tangent, to 3 units in the last place. Near 0 it is x + x^3 p(x^2), with a
// polynomial fitted for this purpose: relative error below 7e-9 before rounding.
inline vec tanh(vec x) {
    const vec size = x < 0 ? -x : x, square = x * x;
    const vec e = exp_negative(size * -2.0f), far = (1 - e) / (1 + e);
    vec p = splat(-0.005515163242f);
    p = p * square + 0.02046941921f;
    p = p * square - 0.05368802286f;
    p = p * square + 0.1333083034f;
    p = p * square - 0.3333325985f;
    const vec near = x + x * square * p;
    return size < 0.65f ? near : x < 0 ? -far : far;
}

}  // namespace
