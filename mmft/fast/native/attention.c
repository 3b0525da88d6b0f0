/* Attention of rows of a line, forward and backward: products in bfloat16 summed in float32, softmax in float32.

   A row is ROW numbers: first token of its queries, how many, first token of a beginning that it also sees, how many,
   where its P begins. Tokens and heads are found by strides. Every product goes through `product`, which takes six rows
   of A (a value is a pair of neighbours along the sum) with a packed B: (pairs, columns) of such pairs. */
#include "vectors.h"
#include <stdlib.h>

enum { ROW = 5, TILE = 6 };
typedef struct { long head, token; } strides;
typedef struct {
    long rows, heads, groups, width, out_width, causal, threads;
    strides q, k, v, out;
    float scale;
} shape;

INLINE long up(long n, long to) { return (n + to - 1) / to * to; }

/* C[TILE][16 * wide] = or += sum over pairs of A * B. A's value (i, k) is a[i * ai + k * ak]. */
INLINE void block(const int wide, long pairs, const uint32_t *a, long ai, long ak, const uint32_t *b, long ldb,
                  float *c, long ldc, const int add) {
    __m512 sum[TILE][4];
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < wide; j++) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++, b += ldb) {
        __m512bh right[4];
        for (int j = 0; j < wide; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
        for (int i = 0; i < TILE; i++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i * ai + k * ak]);
            for (int j = 0; j < wide; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < wide; j++) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
}

/* The same for any number of columns that is a multiple of 16. */
INLINE void product(long columns, long pairs, const uint32_t *a, long ai, long ak, const uint32_t *b, long ldb,
                    float *c, long ldc, const int add) {
    long at = 0;
    for (; at + 64 <= columns; at += 64) block(4, pairs, a, ai, ak, b + at, ldb, c + at, ldc, add);
    if (columns - at == 48) block(3, pairs, a, ai, ak, b + at, ldb, c + at, ldc, add);
    if (columns - at == 32) block(2, pairs, a, ai, ak, b + at, ldb, c + at, ldc, add);
    if (columns - at == 16) block(1, pairs, a, ai, ak, b + at, ldb, c + at, ldc, add);
}

/* Where a row's key t is: the beginning's come first, then its own. */
INLINE const bf16 *token_at(const bf16 *x, long stride, const int64_t *row, long t) {
    return x + (t < row[3] ? row[2] + t : row[0] + t - row[3]) * stride;
}

/* Tokens as columns: to[pair of the width][token], zeros behind the last of `keys` up to `wide`. */
INLINE void across(uint32_t *to, long wide, const bf16 *x, long stride, const int64_t *row, long keys, long width) {
    for (long t = 0; t < keys; t++) {
        const bf16 *from = token_at(x, stride, row, t);
        for (long pair = 0; pair < width / 2; pair++) memcpy(to + pair * wide + t, from + 2 * pair, 4);
    }
    for (long pair = 0; pair < width / 2; pair++) memset(to + pair * wide + keys, 0, (wide - keys) * 4);
}

INLINE void interleave(uint32_t *to, const bf16 *one, const bf16 *other, long width) {
    for (long d = 0; d < width; d += 16) {
        __mmask16 some = first(width - d);
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, one + d));
        __m512i high = other ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, other + d)) : _mm512_setzero_si512();
        _mm512_mask_storeu_epi32(to + d, some, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

/* Tokens along the sum: to[pair of tokens][width]; an odd last one is paired with zeros. */
INLINE void along(uint32_t *to, const bf16 *x, long stride, const int64_t *row, long keys, long width) {
    for (long t = 0; t < keys; t += 2) {
        const bf16 *next = t + 1 < keys ? token_at(x, stride, row, t + 1) : NULL;
        interleave(to + t / 2 * width, token_at(x, stride, row, t), next, width);
    }
}

/* Softmax of TILE rows of scores of which row i sees `seen + i` keys (all `seen` without `causal`): P in bf16, zeros up to `keys`. */
INLINE void soften(float *scores, long lds, bf16 *p, long ldp, long rows, long seen, long causal, long keys, float scale) {
    for (long i = 0; i < rows; i++) {
        float *line = scores + i * lds;
        long n = causal ? seen + i : seen;
        __m512 most = _mm512_set1_ps(-INFINITY), low = most;
        for (long at = 0; at < n; at += 16)
            most = _mm512_max_ps(most, _mm512_mask_loadu_ps(low, first(n - at), line + at));
        __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most) * scale), sum = _mm512_setzero_ps();
        for (long at = 0; at < n; at += 16) {
            __m512 e = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(line + at), _mm512_set1_ps(scale), top));
            e = _mm512_maskz_mov_ps(first(n - at), e);
            sum = _mm512_add_ps(sum, e);
            _mm512_storeu_ps(line + at, e);
        }
        __m512 share = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(sum));
        long at = 0;
        for (; at < n; at += 16) store(p + i * ldp + at, _mm512_mul_ps(_mm512_loadu_ps(line + at), share));
        for (; at < keys; at += 16) _mm256_storeu_si256((__m256i *)(p + i * ldp + at), _mm256_setzero_si256());
    }
}

typedef struct { long own, before, keys, wide; } sizes;

INLINE sizes sizes_of(const int64_t *row) {
    sizes s = {row[1], row[3], row[1] + row[3], up(row[1] + row[3], 16)};
    return s;
}

INLINE long longest(const shape *z, const int64_t *table) {
    long most = 0;
    for (long r = 0; r < z->rows; r++)
        if (sizes_of(table + r * ROW).wide > most) most = sizes_of(table + r * ROW).wide;
    return most;
}

INLINE void *room(long bytes) { return aligned_alloc(64, up(bytes, 64)); }

INLINE void copy_tile(bf16 *to, const bf16 *x, long token, long rows, long width) {
    memset(to, 0, (size_t)TILE * width * 2);
    for (long i = 0; i < rows; i++) memcpy(to + i * width, x + i * token, (size_t)width * 2);
}

/* P of a tile of queries: (TILE, wide) bf16, rows behind the last one zero. */
INLINE void tile_of_p(const shape *z, sizes s, const bf16 *q, long begin, long rows, const uint32_t *keys, bf16 *tile,
                      float *scores, bf16 *p) {
    long seen = z->causal ? s.before + begin + 1 : s.keys;
    long columns = z->causal ? up(seen + rows - 1, 16) : s.wide;
    copy_tile(tile, q, z->q.token, rows, z->width);
    product(columns, z->width / 2, (const uint32_t *)tile, z->width / 2, 1, keys, s.wide, scores, s.wide, 0);
    soften(scores, s.wide, p, s.wide, rows, seen, z->causal, s.wide, z->scale);
}

void mmft_attend(const shape *z, const int64_t *table, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out,
                 bf16 *kept) {
    long most = longest(z, table), shared = z->heads / z->groups, width = z->width, wide = z->out_width;
#pragma omp parallel num_threads(z->threads)
    {
        uint32_t *keys = room(width / 2 * most * 4), *values = room((most + 1) / 2 * wide * 4);
        float *scores = room(TILE * most * 4), *made = room(TILE * wide * 4);
        bf16 *tile = room(TILE * width * 2), *p = room(TILE * most * 2);
#pragma omp for schedule(dynamic) collapse(2)
        for (long r = 0; r < z->rows; r++)
            for (long h = 0; h < z->groups; h++) {
                const int64_t *row = table + r * ROW;
                sizes s = sizes_of(row);
                across(keys, s.wide, k + h * z->k.head, z->k.token, row, s.keys, width);
                along(values, v + h * z->v.head, z->v.token, row, s.keys, wide);
                for (long head = h * shared; head < (h + 1) * shared; head++)
                    for (long at = 0; at < s.own; at += TILE) {
                        long n = s.own - at < TILE ? s.own - at : TILE;
                        memset(p, 0, (size_t)TILE * s.wide * 2);
                        tile_of_p(z, s, q + head * z->q.head + (row[0] + at) * z->q.token, at, n, keys, tile, scores, p);
                        if (kept) memcpy(kept + row[4] + (head * s.own + at) * s.wide, p, (size_t)n * s.wide * 2);
                        long seen = z->causal ? s.before + at + n : s.keys;
                        product(wide, (seen + 1) / 2, (uint32_t *)p, s.wide / 2, 1, values, wide, made, wide, 0);
                        bf16 *to = out + head * z->out.head + (row[0] + at) * z->out.token;
                        for (long i = 0; i < n; i++)
                            for (long d = 0; d < wide; d += 16)
                                store(to + i * z->out.token + d, _mm512_loadu_ps(made + i * wide + d));
                    }
            }
        free(keys), free(values), free(scores), free(made), free(tile), free(p);
    }
}

/* dS = P (dP - sum(P dP)) of a tile, over the scores dP, and in bf16 over nothing else. */
INLINE void slope(float *dp, const bf16 *p, bf16 *ds, long lds, long rows, long columns) {
    for (long i = 0; i < rows; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (long at = 0; at < columns; at += 16)
            sum = _mm512_fmadd_ps(load(p + i * lds + at), _mm512_loadu_ps(dp + i * lds + at), sum);
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (long at = 0; at < columns; at += 16) {
            __m512 d = _mm512_sub_ps(_mm512_loadu_ps(dp + i * lds + at), mean);
            store(ds + i * lds + at, _mm512_mul_ps(load(p + i * lds + at), d));
        }
    }
}

/* to[key][width] += A^T B over the queries from the first that sees the key; A by pairs of queries. */
INLINE void gather(float *to, const uint32_t *a, long lda, const uint32_t *b, sizes s, long causal, long width) {
    long pairs = (s.own + 1) / 2;
    for (long j = 0; j < s.keys; j += TILE) {
        long from = causal && j > s.before ? (j - s.before) / 2 : 0;
        product(width, pairs - from, a + from * lda + j, 1, lda, b + from * width, width, to + j * width, width, 1);
    }
}

/* dq as q, in bf16; dk and dv (groups, tokens, width) float32, added to. P is made again where it was not kept. */
void mmft_attend_back(const shape *z, const int64_t *table, const bf16 *q, const bf16 *k, const bf16 *v,
                      const bf16 *given, const bf16 *kept, bf16 *dq, strides to, float *parts, long part) {
    long most = longest(z, table), shared = z->heads / z->groups, width = z->width, wide = z->out_width;
#pragma omp parallel num_threads(z->threads)
    {
        uint32_t *keys = room(width / 2 * most * 4), *values = room(wide / 2 * most * 4);
        uint32_t *keys_along = room((most + 1) / 2 * width * 4);
        uint32_t *q_along = room((most + TILE) / 2 * width * 4), *given_along = room((most + TILE) / 2 * wide * 4);
        uint32_t *p_pairs = room((most + TILE) / 2 * (most + 16) * 4), *ds_pairs = room((most + TILE) / 2 * (most + 16) * 4);
        float *scores = room(TILE * most * 4), *made = room(TILE * width * 4);
        bf16 *tile = room(TILE * (width > wide ? width : wide) * 2), *p = room(TILE * most * 2), *ds = room(TILE * most * 2);
#pragma omp for schedule(dynamic) collapse(2)
        for (long r = 0; r < z->rows; r++)
            for (long h = 0; h < z->groups; h++) {
                const int64_t *row = table + r * ROW;
                const int64_t alone[ROW] = {row[0], row[1], 0, 0, 0};
                sizes s = sizes_of(row);
                long lda = s.wide + 16;
                if (!kept) across(keys, s.wide, k + h * z->k.head, z->k.token, row, s.keys, width);
                across(values, s.wide, v + h * z->v.head, z->v.token, row, s.keys, wide);
                along(keys_along, k + h * z->k.head, z->k.token, row, s.keys, width);
                float *dk = parts + (r * z->groups + h) * part, *dv = dk + (s.keys + TILE) * width;
                memset(dk, 0, (size_t)(s.keys + TILE) * (width + wide) * 4);
                for (long head = h * shared; head < (h + 1) * shared; head++) {
                    const bf16 *queries = q + head * z->q.head, *slopes = given + head * z->out.head;
                    along(q_along, queries, z->q.token, alone, s.own, width);
                    along(given_along, slopes, z->out.token, alone, s.own, wide);
                    for (long at = 0; at < s.own; at += TILE) {
                        long n = s.own - at < TILE ? s.own - at : TILE, seen = z->causal ? s.before + at + n : s.keys;
                        long columns = up(seen, 16);
                        memset(p, 0, (size_t)TILE * s.wide * 2), memset(ds, 0, (size_t)TILE * s.wide * 2);
                        if (kept) memcpy(p, kept + row[4] + (head * s.own + at) * s.wide, (size_t)n * s.wide * 2);
                        else tile_of_p(z, s, queries + (row[0] + at) * z->q.token, at, n, keys, tile, scores, p);
                        copy_tile(tile, slopes + (row[0] + at) * z->out.token, z->out.token, n, wide);
                        product(columns, wide / 2, (uint32_t *)tile, wide / 2, 1, values, s.wide, scores, s.wide, 0);
                        slope(scores, p, ds, s.wide, n, columns);
                        product(width, (seen + 1) / 2, (uint32_t *)ds, s.wide / 2, 1, keys_along, width, made, width, 0);
                        bf16 *into = dq + head * to.head + (row[0] + at) * to.token;
                        for (long i = 0; i < n; i++)
                            for (long d = 0; d < width; d += 16)
                                store(into + i * to.token + d, _mm512_mul_ps(_mm512_set1_ps(z->scale), _mm512_loadu_ps(made + i * width + d)));
                        for (long i = 0; i < n; i += 2) {
                            uint32_t *line = p_pairs + (at + i) / 2 * lda, *other = ds_pairs + (at + i) / 2 * lda;
                            interleave(line, p + i * s.wide, p + (i + 1) * s.wide, columns);
                            interleave(other, ds + i * s.wide, ds + (i + 1) * s.wide, columns);
                            for (long j = columns; j < columns + 16 && j < lda; j++) line[j] = other[j] = 0;
                        }
                    }
                    gather(dk, ds_pairs, lda, q_along, s, z->causal, width);
                    gather(dv, p_pairs, lda, given_along, s, z->causal, wide);
                }
            }
        free(keys), free(values), free(keys_along), free(q_along), free(given_along), free(p_pairs), free(ds_pairs);
        free(scores), free(made), free(tile), free(p), free(ds);
    }
}

/* What the rows found for their keys, summed in the order of the rows and put into (tokens, groups, width) bf16. */
void mmft_attend_sum(const shape *z, const int64_t *table, long tokens, const float *parts, long part, bf16 *dk, bf16 *dv) {
    long width = z->width, wide = z->out_width, both = width + wide;
#pragma omp parallel for schedule(static) num_threads(z->threads)
    for (long h = 0; h < z->groups; h++) {
        float *sum = calloc(tokens * both, 4);
        for (long r = 0; r < z->rows; r++) {
            const int64_t *row = table + r * ROW;
            sizes s = sizes_of(row);
            const float *keys = parts + (r * z->groups + h) * part, *values = keys + (s.keys + TILE) * width;
            for (long t = 0; t < s.keys; t++) {
                float *into = sum + (t < s.before ? row[2] + t : row[0] + t - s.before) * both;
                for (long d = 0; d < width; d++) into[d] += keys[t * width + d];
                for (long d = 0; d < wide; d++) into[width + d] += values[t * wide + d];
            }
        }
        for (long t = 0; t < tokens; t++) {
            const float *from = sum + t * both;
            for (long d = 0; d < width; d += 16)
                store(dk + (t * z->groups + h) * width + d, _mm512_mul_ps(_mm512_set1_ps(z->scale), _mm512_loadu_ps(from + d)));
            for (long d = 0; d < wide; d += 16)
                store(dv + (t * z->groups + h) * wide + d, _mm512_loadu_ps(from + width + d));
        }
        free(sum);
    }
}
