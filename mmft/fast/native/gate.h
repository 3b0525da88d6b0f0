/* The gated product and its gradient, rounded where torch's formulas round. */
#include "acts.h"

/* Within 1 in 200,000: it becomes bfloat16. */
INLINE __m512 sigmoid(__m512 x) {
    return _mm512_div_ps(_mm512_set1_ps(1.f), one_and_power(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f))));
}

/* round(silu(gate)) * up. */
INLINE __m512 gated(__m512 gate, __m512 up) { return _mm512_mul_ps(rounded(_mm512_mul_ps(gate, sigmoid(gate))), up); }

/* to_up = round(silu(gate)) * given; to_gate = round(given * up) * s (1 + gate (1 - s)), s the sigmoid of gate; the
   product itself comes back. */
INLINE __m512 gated_back(__m512 gate, __m512 up, __m512 given, __m512 *to_gate, __m512 *to_up) {
    __m512 one = _mm512_set1_ps(1.f), s = sigmoid(gate), opened = rounded(_mm512_mul_ps(gate, s));
    __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, s), one));
    *to_gate = _mm512_mul_ps(rounded(_mm512_mul_ps(given, up)), slope);
    *to_up = _mm512_mul_ps(opened, given);
    return _mm512_mul_ps(opened, up);
}
