/* What follows a frozen layer, of its output in bfloat16; rounded where torch's operators round. */
#pragma once
#include "vectors.h"

enum { NOTHING, TANH_GELU, ERF_GELU, QUICK_GELU, RELU };

INLINE __m512 one_and_power(__m512 x) { return _mm512_add_ps(_mm512_set1_ps(1.f), power(x)); }

/* x / 2 (1 + tanh(u)) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE __m512 tanh_gelu(__m512 x) {
    __m512 square = _mm512_mul_ps(x, x), slope = _mm512_set1_ps(-2.30220819f);
    __m512 bent = _mm512_fmadd_ps(square, _mm512_set1_ps(-2.30220819f * 0.044715f), slope);
    return _mm512_div_ps(x, one_and_power(_mm512_mul_ps(x, bent)));
}

/* x Phi(x); for a = |x|, e^(a^2 / 2) (1 - Phi(a)) is a polynomial of 1 / (1 + a / 5) within 2 in a million. */
INLINE __m512 erf_gelu(__m512 x) {
    __m512 one = _mm512_set1_ps(1.f), a = _mm512_abs_ps(x);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(a, _mm512_set1_ps(0.2f), one)), y = _mm512_set1_ps(0.279092003f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.386817654f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.446926409f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.123175898f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.132532489f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.0710931825f));
    y = _mm512_mul_ps(_mm512_fmadd_ps(y, t, _mm512_set1_ps(0.0803500931f)), t);
    y = _mm512_mul_ps(y, power(_mm512_mul_ps(_mm512_mul_ps(a, a), _mm512_set1_ps(-0.72134752f))));
    __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(y, above, one, y));
}

/* x round(sigmoid(round(1.702 x))) */
INLINE __m512 quick_gelu(__m512 x) {
    __m512 steep = rounded(_mm512_mul_ps(x, _mm512_set1_ps(1.702f)));
    __m512 below = one_and_power(_mm512_mul_ps(steep, _mm512_set1_ps(-1.44269504f)));
    return _mm512_mul_ps(x, rounded(_mm512_div_ps(_mm512_set1_ps(1.f), below)));
}

INLINE __m512 acted(const int act, __m512 x) {
    if (act == TANH_GELU) return tanh_gelu(x);
    if (act == ERF_GELU) return erf_gelu(x);
    if (act == QUICK_GELU) return quick_gelu(x);
    return _mm512_max_ps(_mm512_setzero_ps(), x);
}
