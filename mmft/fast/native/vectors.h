/* Vectors of 16 floats and bfloat16 in memory, for processors with AVX512-BF16. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
#define INLINE static inline __attribute__((always_inline))

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 load(const bf16 *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }
INLINE __m512 load_some(const bf16 *from, __mmask16 some) { return widen(_mm256_maskz_loadu_epi16(some, from)); }
/* Rounded to the nearest, ties to even, by integers. */
INLINE __m256i narrow_small(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
/* The same by the processor's own instruction, which drops denormals; NaN stays NaN. */
INLINE __m256i narrow(__m512 x) {
    __mmask16 small = _mm512_fpclass_ps_mask(x, 0x20);
    __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    return __builtin_expect(small, 0) ? _mm256_mask_mov_epi16(bits, small, narrow_small(x)) : bits;
}
INLINE void store(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, narrow(x)); }
INLINE void store_some(bf16 *to, __m512 x, __mmask16 some) { _mm256_mask_storeu_epi16(to, some, narrow(x)); }
/* The same for what enters products alone, by the processor's instruction: they take a denormal for 0 too. */
INLINE void store_factor(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }
INLINE __m512 rounded(__m512 x) { return widen(narrow(x)); }
/* 0, n, 2 n, … */
INLINE __m512i steps(long n) {
    __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mullo_epi32(count, _mm512_set1_epi32((int)n));
}
INLINE __mmask16 first(long n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

/* e^x within 2 units in the last place: x = n ln 2 + r, a polynomial of r (Cephes), 2^n; NaN stays NaN. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(89.f), _mm512_max_ps(_mm512_set1_ps(-104.f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
    return _mm512_scalef_ps(y, n);
}

/* 2^x within 1 in 300,000, for what becomes bfloat16: a polynomial of x - n, 2^n. Of minus infinity it is 0 and of
   infinity infinity (the polynomial's NaN does not count there), of NaN NaN. */
INLINE __m512 power(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n), y = _mm512_set1_ps(9.5828529e-3f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.5906426e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4024099e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9312418e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f)), n);
}

/* 16 rows of 16 values of 4 bytes become columns; row i is then y[i]. */
INLINE void turned(__m512i *x, __m512i *y) {
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        y[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        y[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        y[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}
