/* Attention of rows of a line, backward (see attention.h): with dP = dO V^T,
   dS = P (dP - sum(P dP)), dQ = s dS K, dK = s dS^T Q, dV = P^T dO. */
#include "attention.h"

enum { QUERIES = 64 * TILE }; /* whose P and dS are held at once, so that a long row takes no square of its length */

typedef struct {
    uint32_t *keys, *values, *keys_along, *q_along, *given_along, *p_pairs, *ds_pairs;
    float *scores, *made;
    bf16 *tile, *p, *ds;
} desk;

/* The arrays of a thread in its room; how many bytes they take. */
static long lay(desk *on, char *room, const shape *z, long most) {
    long at = 0, width = z->width, wide = z->out_width, pairs = (most < QUERIES ? most : QUERIES) / 2;
    on->keys = take(room, &at, width / 2 * most * 4);
    on->values = take(room, &at, wide / 2 * most * 4);
    on->keys_along = take(room, &at, most / 2 * width * 4);
    on->q_along = take(room, &at, pairs * width * 4);
    on->given_along = take(room, &at, pairs * wide * 4);
    on->p_pairs = take(room, &at, pairs * (most + 16) * 4);
    on->ds_pairs = take(room, &at, pairs * (most + 16) * 4);
    on->scores = take(room, &at, TILE * most * 4);
    on->made = take(room, &at, TILE * width * 4);
    on->tile = take(room, &at, TILE * (width > wide ? width : wide) * 2);
    on->p = take(room, &at, TILE * most * 2);
    on->ds = take(room, &at, TILE * most * 2);
    return at;
}

/* Bytes of room that `mmft_attend_back` needs for each thread. */
long mmft_attend_back_room(const shape *z, const int64_t *table) {
    desk on;
    return lay(&on, 0, z, longest(z, table));
}

/* dS of a tile, in bf16. */
INLINE void slope(const float *dp, const bf16 *p, bf16 *ds, long lds, long rows, long columns) {
    for (long i = 0; i < rows; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (long at = 0; at < columns; at += 16)
            sum = _mm512_fmadd_ps(load(p + i * lds + at), _mm512_loadu_ps(dp + i * lds + at), sum);
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (long at = 0; at < columns; at += 16) {
            __m512 d = _mm512_sub_ps(_mm512_loadu_ps(dp + i * lds + at), mean);
            store_factor(ds + i * lds + at, _mm512_mul_ps(load(p + i * lds + at), d));
        }
    }
}

/* A head's queries `at` to `at + n`: dQ, and the pairs of P and dS from `line` on. */
INLINE void tile_back(const shape *z, const int64_t *row, sizes s, const bf16 *q, const bf16 *given, const bf16 *kept,
                      bf16 *dq, long token, long at, long n, long line, const desk *on) {
    long width = z->width, wide = z->out_width, lda = s.wide + 16;
    long seen = z->causal ? s.before + at + n : s.keys, columns = up(seen, 16);
    if (n < TILE) memset(on->p, 0, (size_t)TILE * s.wide * 2), memset(on->ds, 0, (size_t)TILE * s.wide * 2);
    if (kept) {
        for (long i = 0; i < n; i++) memcpy(on->p + i * s.wide, kept + (at + i) * s.wide, (size_t)columns * 2);
    } else {
        float share[TILE];
        const bf16 *queries = q + (row[0] + at) * z->q.token;
        soft_tile(z, s, queries, at, n, on->keys, on->tile, on->scores, on->ds, share);
        shares(on->scores, s.wide, share, on->p, n, columns);
    }
    copy_tile(on->tile, given + (row[0] + at) * z->out.token, z->out.token, n, wide);
    const uint32_t *left = (const uint32_t *)on->tile, *steep = (const uint32_t *)on->ds;
    product(columns, wide / 2, left, wide / 2, 1, on->values, s.wide, on->scores, s.wide, 0);
    slope(on->scores, on->p, on->ds, s.wide, n, columns);
    product(width, (seen + 1) / 2, steep, s.wide / 2, 1, on->keys_along, width, on->made, width, 0);
    bf16 *into = dq + (row[0] + at) * token;
    for (long i = 0; i < n; i++)
        for (long d = 0; d < width; d += 16) {
            __m512 sum = _mm512_loadu_ps(on->made + i * width + d);
            store(into + i * token + d, _mm512_mul_ps(_mm512_set1_ps(z->scale), sum));
        }
    for (long i = 0; i < n; i += 2) {
        uint32_t *p = on->p_pairs + (line + i / 2) * lda, *ds = on->ds_pairs + (line + i / 2) * lda;
        interleave(p, on->p + i * s.wide, on->p + (i + 1) * s.wide, columns);
        interleave(ds, on->ds + i * s.wide, on->ds + (i + 1) * s.wide, columns);
        memset(p + columns, 0, 64), memset(ds + columns, 0, 64); /* a tile of keys ends behind what is seen */
    }
}

/* to[key][width] += A^T B over `many` queries from `begin` on that see the key; A by pairs of queries. */
INLINE void gather(float *to, const uint32_t *a, const uint32_t *b, sizes s, long causal, long begin, long many,
                   long width) {
    long lda = s.wide + 16, pairs = (many + 1) / 2, before = s.before + begin;
    for (long j = 0; j < (causal ? before + many : s.keys); j += TILE) {
        long from = causal && j > before ? (j - before) / 2 : 0;
        product(width, pairs - from, a + from * lda + j, 1, lda, b + from * width, width, to + j * width, width, 1);
    }
}

/* dq as q, in bf16; dk and dv (keys, width) float32 of each row and group in `parts`, `TILE` keys of room behind each.
   P is made again where it was not kept. */
void mmft_attend_back(const shape *z, const int64_t *table, const bf16 *q, const bf16 *k, const bf16 *v,
                      const bf16 *given, const bf16 *kept, bf16 *dq, strides to, float *parts, char *room,
                      long bytes) {
    long most = longest(z, table), shared = z->heads / z->groups, width = z->width, wide = z->out_width;
#pragma omp parallel num_threads(z->threads)
    {
        desk on;
        lay(&on, room + omp_get_thread_num() * bytes, z, most);
#pragma omp for schedule(dynamic) collapse(2)
        for (long r = 0; r < z->rows; r++)
            for (long h = 0; h < z->groups; h++) {
                const int64_t *row = table + r * ROW;
                sizes s = sizes_of(row);
                if (!kept) across(on.keys, s.wide, k + h * z->k.head, z->k.token, row, s.keys, width);
                across(on.values, s.wide, v + h * z->v.head, z->v.token, row, s.keys, wide);
                along(on.keys_along, k + h * z->k.head, z->k.token, row, s.keys, width);
                float *dk = parts + row[5] + h * (s.keys + TILE) * (width + wide), *dv = dk + (s.keys + TILE) * width;
                memset(dk, 0, (size_t)(s.keys + TILE) * (width + wide) * 4);
                for (long head = h * shared; head < (h + 1) * shared; head++) {
                    const bf16 *queries = q + head * z->q.head, *slopes = given + head * z->out.head;
                    const bf16 *p = kept ? kept + row[4] + head * s.own * s.wide : 0;
                    for (long begin = 0; begin < s.own; begin += QUERIES) {
                        long many = s.own - begin < QUERIES ? s.own - begin : QUERIES;
                        const int64_t alone[ROW] = {row[0] + begin, many, 0, 0, 0, 0};
                        along(on.q_along, queries, z->q.token, alone, many, width);
                        along(on.given_along, slopes, z->out.token, alone, many, wide);
                        for (long at = 0; at < many; at += TILE)
                            tile_back(z, row, s, queries, slopes, p, dq + head * to.head, to.token, begin + at,
                                      many - at < TILE ? many - at : TILE, at / 2, &on);
                        gather(dk, on.ds_pairs, on.q_along, s, z->causal, begin, many, width);
                        gather(dv, on.p_pairs, on.given_along, s, z->causal, begin, many, wide);
                    }
                }
            }
    }
}

/* What the rows found for their keys, summed in the order of the rows and put into (tokens, groups, width) bf16; `room`
   is (threads, tokens, width + out_width). */
void mmft_attend_sum(const shape *z, const int64_t *table, long tokens, const float *parts, float *room, bf16 *dk,
                     bf16 *dv) {
    long width = z->width, wide = z->out_width, both = width + wide;
    __m512 scale = _mm512_set1_ps(z->scale);
#pragma omp parallel for schedule(static) num_threads(z->threads)
    for (long h = 0; h < z->groups; h++) {
        float *sum = room + omp_get_thread_num() * tokens * both;
        memset(sum, 0, (size_t)(tokens * both) * 4);
        for (long r = 0; r < z->rows; r++) {
            const int64_t *row = table + r * ROW;
            sizes s = sizes_of(row);
            const float *keys = parts + row[5] + h * (s.keys + TILE) * both, *values = keys + (s.keys + TILE) * width;
            for (long t = 0; t < s.keys; t++) {
                float *into = sum + (t < s.before ? row[2] + t : row[0] + t - s.before) * both;
                for (long d = 0; d < width; d++) into[d] += keys[t * width + d];
                for (long d = 0; d < wide; d++) into[width + d] += values[t * wide + d];
            }
        }
        for (long t = 0; t < tokens; t++) {
            const float *from = sum + t * both;
            bf16 *to_key = dk + (t * z->groups + h) * width, *to_value = dv + (t * z->groups + h) * wide;
            for (long d = 0; d < width; d += 16) store(to_key + d, _mm512_mul_ps(scale, _mm512_loadu_ps(from + d)));
            for (long d = 0; d < wide; d += 16) store(to_value + d, _mm512_loadu_ps(from + width + d));
        }
    }
}
