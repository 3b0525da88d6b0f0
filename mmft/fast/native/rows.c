/* RMS norm and the gated product, a pass each; rounded where transformers' and torch's formulas round. */
#include "vectors.h"

/* y = round(w * round(x * r)), r = 1 / sqrt(mean(x^2) + eps), for `count` rows of `width`. */
void mmft_norm(const bf16 *x, const bf16 *w, bf16 *y, float *rate, long count, long width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < count; row++) {
        const bf16 *from = x + row * width;
        __m512 square = _mm512_setzero_ps();
        for (long at = 0; at < width; at += 16) {
            __m512 v = load_some(from + at, first(width - at));
            square = _mm512_fmadd_ps(v, v, square);
        }
        float r = 1.f / sqrtf(_mm512_reduce_add_ps(square) / width + eps);
        rate[row] = r;
        for (long at = 0; at < width; at += 16) {
            __mmask16 some = first(width - at);
            __m512 scaled = rounded(_mm512_mul_ps(load_some(from + at, some), _mm512_set1_ps(r)));
            store_some(y + row * width + at, _mm512_mul_ps(scaled, load_some(w + at, some)), some);
        }
    }
}

/* dx = r * (g - x r r mean(g x)), g = round(dy * w). */
void mmft_norm_back(const bf16 *given, const bf16 *x, const bf16 *w, const float *rate, bf16 *dx, long count,
                    long width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < count; row++) {
        const bf16 *dy = given + row * width, *from = x + row * width;
        __m512 both = _mm512_setzero_ps();
        for (long at = 0; at < width; at += 16) {
            __mmask16 some = first(width - at);
            __m512 g = rounded(_mm512_mul_ps(load_some(dy + at, some), load_some(w + at, some)));
            both = _mm512_fmadd_ps(g, load_some(from + at, some), both);
        }
        float r = rate[row], share = -_mm512_reduce_add_ps(both) * r * r / width;
        for (long at = 0; at < width; at += 16) {
            __mmask16 some = first(width - at);
            __m512 g = rounded(_mm512_mul_ps(load_some(dy + at, some), load_some(w + at, some)));
            g = _mm512_fmadd_ps(load_some(from + at, some), _mm512_set1_ps(share), g);
            store_some(dx + row * width + at, _mm512_mul_ps(g, _mm512_set1_ps(r)), some);
        }
    }
}

INLINE __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* out = round(round(silu(gate)) * up). */
void mmft_gate(const bf16 *gate, const bf16 *up, bf16 *out, long count, int threads) {
    long blocks = (count + 15) / 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        long at = block * 16;
        __mmask16 some = first(count - at);
        __m512 g = load_some(gate + at, some);
        __m512 opened = rounded(_mm512_mul_ps(g, sigmoid(g)));
        store_some(out + at, _mm512_mul_ps(opened, load_some(up + at, some)), some);
    }
}

/* to_up = round(silu(gate)) * given; to_gate = round(given * up) * s (1 + gate (1 - s)), s the sigmoid of gate. */
void mmft_gate_back(const bf16 *gate, const bf16 *up, const bf16 *given, bf16 *to_gate, bf16 *to_up, long count,
                    int threads) {
    long blocks = (count + 15) / 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        long at = block * 16;
        __mmask16 some = first(count - at);
        __m512 g = load_some(gate + at, some), dy = load_some(given + at, some), s = sigmoid(g);
        __m512 one = _mm512_set1_ps(1.f);
        __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
        __m512 inner = rounded(_mm512_mul_ps(dy, load_some(up + at, some)));
        store_some(to_gate + at, _mm512_mul_ps(inner, slope), some);
        store_some(to_up + at, _mm512_mul_ps(rounded(_mm512_mul_ps(g, s)), dy), some);
    }
}
