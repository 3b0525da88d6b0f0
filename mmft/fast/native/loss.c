/* Cross-entropy of a vocabulary head, and the gradient of its input, for rows h with goals t:
   z = h W^T, term = log sum exp z - z[t], dh = (softmax(z) - onehot(t)) W.

   z is rounded to bfloat16, as is its gradient, which takes its place; all else is float32. The second product takes
   BLOCK words of the vocabulary at a time, in that order whatever the number of threads. */
#include "product.h"

enum { BLOCK = 1024 };

/* A row's term, whether its first largest z is the goal's, and where it is `wanted`, z's gradient in its place. */
static void row_of(bf16 *z, long words, long goal, float *term, int64_t *hit, int wanted) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long at = 0; at < words; at += 16) {
        __mmask16 some = first(words - at);
        most = _mm512_mask_max_ps(most, some, most, load_some(z + at, some));
    }
    float top = _mm512_reduce_max_ps(most), there = _mm512_cvtss_f32(load_some(z + goal, 1));
    for (long at = 0; at < words; at += 16) {
        __mmask16 some = first(words - at);
        __m512 e = exponential(_mm512_sub_ps(load_some(z + at, some), _mm512_set1_ps(top)));
        sum = _mm512_mask_add_ps(sum, some, sum, e);
    }
    float log = top + logf(_mm512_reduce_add_ps(sum));
    *term = log - there;
    long before = 0;
    while (there == top && before < goal && z[before] != z[goal]) before++;
    *hit = there == top && before == goal;
    for (long at = 0; wanted && at < words; at += 16) {
        __mmask16 some = first(words - at);
        __m512 p = exponential(_mm512_sub_ps(load_some(z + at, some), _mm512_set1_ps(log)));
        if (goal - at >= 0 && goal - at < 16)
            p = _mm512_mask_sub_ps(p, (__mmask16)(1u << (goal - at)), p, _mm512_set1_ps(1.f));
        store_some(z + at, p, some);
    }
}

/* dh from z's gradient, by way of `sums` (rows, width) in float32. */
static void to_states(const bf16 *w, const bf16 *z, float *sums, long rows, long words, long width, uint32_t *panel,
                      long here, long all) {
    for (long at = 0; at < words; at += BLOCK) {
        long depth = words - at < BLOCK ? words - at : BLOCK;
        term one = {z + at, w + at * width, words, width, depth};
        job made = {&one, 1, 0, rows, width, width, 0, 0, sums, 1.f, 1, at > 0};
        share(&made, panel, here, all, 0);
    }
}

/* `z`: room (rows, words). Without `dh` (rows, width) terms and hits alone. `room`: panels for the threads, `each`
   values of 4 bytes apart. */
void mmft_loss(const bf16 *h, const bf16 *w, const int64_t *goals, bf16 *z, float *terms, int64_t *hits, float *sums,
               bf16 *dh, long rows, long words, long width, uint32_t *room, long each, long threads) {
#pragma omp parallel num_threads(threads)
    {
        long here = omp_get_thread_num(), all = omp_get_num_threads();
        uint32_t *panel = room + here * each;
        term one = {h, w, width, width, width};
        job made = {&one, 1, 1, rows, words, words, 0, z};
        share(&made, panel, here, all, 0);
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (long row = 0; row < rows; row++)
            row_of(z + row * words, words, goals[row], terms + row, hits + row, dh != 0);
        if (dh) to_states(w, z, sums, rows, words, width, panel, here, all);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long at = 0; at < (dh ? rows * width : 0); at += 16) {
            __mmask16 some = first(rows * width - at);
            store_some(dh + at, _mm512_maskz_loadu_ps(some, sums + at), some);
        }
    }
}
