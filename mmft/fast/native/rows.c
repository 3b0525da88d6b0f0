/* RMS norm and the gated product, a pass each; rounded where transformers' and torch's formulas round. */
#include "gate.h"

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

/* out = round(round(silu(gate)) * up). */
void mmft_gate(const bf16 *gate, const bf16 *up, bf16 *out, long count, int threads) {
    long blocks = (count + 15) / 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        long at = block * 16;
        __mmask16 some = first(count - at);
        store_some(out + at, gated(load_some(gate + at, some), load_some(up + at, some)), some);
    }
}

/* The gradients of gate and up; `to_up` may be `given`. */
void mmft_gate_back(const bf16 *gate, const bf16 *up, const bf16 *given, bf16 *to_gate, bf16 *to_up, long count,
                    int threads) {
    long blocks = (count + 15) / 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        long at = block * 16;
        __mmask16 some = first(count - at);
        __m512 left, right, one = load_some(gate + at, some), other = load_some(up + at, some);
        gated_back(one, other, load_some(given + at, some), &left, &right);
        store_some(to_gate + at, left, some);
        store_some(to_up + at, right, some);
    }
}
