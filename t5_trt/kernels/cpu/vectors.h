// Vectors of float32, by the compiler's vector extension: one source for AVX-512, AVX2 and other processors.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
// the same in memory, at any address of a number
typedef float FloatsAt __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE Floats load(const float *from) { return *(const FloatsAt *)from; }
INLINE void store(float *to, Floats values) { *(FloatsAt *)to = values; }
INLINE Floats all(float value) { return value - (Floats){}; }

// a b + c, rounded once where the processor can. Compilers are told not to contract products and sums themselves: they do so in one
// place and not in another, and results would depend on the number of rows.
INLINE Floats fused(Floats a, Floats b, Floats c) {
#if LANES == 16
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif LANES == 4 && defined(__ARM_NEON)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The first `count` lanes, and zeros.
INLINE Floats load_some(const float *from, int64_t count) {
#if LANES == 16
    return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    float lanes[LANES] = {0};
    memcpy(lanes, from, (size_t)count * sizeof *lanes);
    return load(lanes);
#endif
}

// bfloat16 is the upper half of a float32
INLINE Floats load_bf16(const uint16_t *from) {
    Ints wide = __builtin_convertvector(*(const HalvesAt *)from, Ints) << 16;
    return (Floats)wide;
}
INLINE Floats load_some_bf16(const uint16_t *from, int64_t count) {
    uint16_t lanes[LANES] = {0};
    memcpy(lanes, from, (size_t)count * sizeof *lanes);
    return load_bf16(lanes);
}
INLINE float one_bf16(uint16_t value) {
    uint32_t wide = (uint32_t)value << 16;
    float made;
    memcpy(&made, &wide, 4);
    return made;
}

// SWAPPED(values, by): each lane in the place of the one `by` further on, which is a power of two
#define FOUR(from, by) ((from) ^ (by)), ((from + 1) ^ (by)), ((from + 2) ^ (by)), ((from + 3) ^ (by))
#if LANES == 16
#define SWAPPED(values, by)                                                                                                     \
    __builtin_shufflevector(values, values, FOUR(0, by), FOUR(4, by), FOUR(8, by), FOUR(12, by))
#elif LANES == 8
#define SWAPPED(values, by) __builtin_shufflevector(values, values, FOUR(0, (by) & 7), FOUR(4, (by) & 7))
#else
#define SWAPPED(values, by) __builtin_shufflevector(values, values, FOUR(0, (by) & 3))
#endif

INLINE Floats chosen(Ints where, Floats a, Floats b) { return (Floats)((where & (Ints)a) | (~where & (Ints)b)); }
INLINE Floats larger(Floats a, Floats b) { return chosen((Ints)(a > b), a, b); }
INLINE Floats smaller(Floats a, Floats b) { return chosen((Ints)(a < b), a, b); }

// Over all lanes, in halves.
INLINE float sum_of(Floats values) {
    if (LANES > 8) values += SWAPPED(values, 8);
    if (LANES > 4) values += SWAPPED(values, 4);
    values += SWAPPED(values, 2);
    values += SWAPPED(values, 1);
    return values[0];
}
// Some sums over all lanes, with the additions of `sum_of`.
#if LANES == 16
enum { SUMS_AT_ONCE = 8 };
INLINE void several_sums(const Floats of[SUMS_AT_ONCE], float sums[SUMS_AT_ONCE]) {
    Floats half[4], quarter[2];
    for (int i = 0; i < 4; i++) {
        Floats a = of[2 * i], b = of[2 * i + 1];
        half[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; i++) {
        Floats a = half[2 * i], b = half[2 * i + 1];
        quarter[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                     __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    Floats a = quarter[0], b = quarter[1];  // four lanes each of sums 0 to 3, and of sums 4 to 7
    a = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    a += SWAPPED(a, 1);
    typedef float Eight __attribute__((vector_size(32)));
    Eight made = __builtin_shufflevector(a, a, 0, 4, 8, 12, 2, 6, 10, 14);
    memcpy(sums, &made, sizeof made);
}
#else
enum { SUMS_AT_ONCE = 4 };
INLINE void several_sums(const Floats of[SUMS_AT_ONCE], float sums[SUMS_AT_ONCE]) {
    for (int i = 0; i < SUMS_AT_ONCE; i++) sums[i] = sum_of(of[i]);
}
#endif

INLINE float largest_of(Floats values) {
    if (LANES > 8) values = larger(values, SWAPPED(values, 8));
    if (LANES > 4) values = larger(values, SWAPPED(values, 4));
    values = larger(values, SWAPPED(values, 2));
    values = larger(values, SWAPPED(values, 1));
    return values[0];
}

// exp(x), within 2 units of the last place; above 88 exp(88): 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Taylor's to degree 6,
// Cody and Waite's reduction in two parts); below -87 it is 0.
INLINE Floats exponential(Floats x) {
    const Floats least = all(-87.0f);
    Ints dead = (Ints)(x < least);
    x = smaller(larger(x, least), all(88.0f));
    Floats shifted = fused(x, all(1.44269504f), all(12582912.0f));  // rounds to a whole number, which the low bits then hold
    Floats n = shifted - 12582912.0f;
    Ints power = ((Ints)shifted + 127) << 23;
    Floats r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
    Floats p = all(1.0f / 720);
    p = fused(p, r, all(1.0f / 120));
    p = fused(p, r, all(1.0f / 24));
    p = fused(p, r, all(1.0f / 6));
    p = fused(p, r, all(0.5f));
    p = fused(p, r, all(1.0f));
    p = fused(p, r, all(1.0f));
    return (Floats)((Ints)(p * (Floats)power) & ~dead);
}
