/* Attention of rows of a line: products in bfloat16 summed in float32, softmax in float32.

   A row is ROW numbers: first token of its queries, how many, first token of a beginning that it also sees, how many,
   where its P begins, where the slopes of its keys and values do. Tokens and heads are found by strides. Every product
   goes through `product`, which takes six rows of A (a value is a pair of neighbours along the sum) with a packed B:
   (pairs, columns) of such pairs. Nothing is allocated here: the caller gives the room that was told to it. */
#include "vectors.h"
#include <omp.h>

enum { ROW = 6, TILE = 6 };
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

/* The same for any number of columns that is a multiple of 16; 80 are 48 and 32: a block of 16 waits for its sums. */
INLINE void product(long columns, long pairs, const uint32_t *a, long ai, long ak, const uint32_t *b, long ldb,
                    float *c, long ldc, const int add) {
    for (long at = 0, left = columns; left > 0; left = columns - at) {
        long wide = left == 80 ? 48 : left < 64 ? left : 64;
        if (wide == 64) block(4, pairs, a, ai, ak, b + at, ldb, c + at, ldc, add);
        if (wide == 48) block(3, pairs, a, ai, ak, b + at, ldb, c + at, ldc, add);
        if (wide == 32) block(2, pairs, a, ai, ak, b + at, ldb, c + at, ldc, add);
        if (wide == 16) block(1, pairs, a, ai, ak, b + at, ldb, c + at, ldc, add);
        at += wide;
    }
}

/* Where a row's key t is: the beginning's come first, then its own. */
INLINE const bf16 *token_at(const bf16 *x, long stride, const int64_t *row, long t) {
    return x + (t < row[3] ? row[2] + t : row[0] + t - row[3]) * stride;
}

/* Tokens as columns: to[pair of the width][token], zeros behind the last of `keys` up to `wide`. */
INLINE void across(uint32_t *to, long wide, const bf16 *x, long stride, const int64_t *row, long keys, long width) {
    for (long t = 0; t < wide; t += 16)
        for (long pair = 0; pair < width / 2; pair += 16) {
            __m512i from[16], column[16];
            __mmask16 some = first(width / 2 - pair);
            for (long i = 0; i < 16; i++)
                from[i] = t + i < keys ? _mm512_maskz_loadu_epi32(some, token_at(x, stride, row, t + i) + 2 * pair)
                                       : _mm512_setzero_si512();
            turned(from, column);
            for (long i = 0; i < 16 && pair + i < width / 2; i++)
                _mm512_storeu_si512(to + (pair + i) * wide + t, column[i]);
        }
}

/* to[i] = the pair (one[i], other[i]); without `other` it is paired with zero. */
INLINE void interleave(uint32_t *to, const bf16 *one, const bf16 *other, long width) {
    for (long d = 0; d < width; d += 16) {
        __mmask16 some = first(width - d);
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, one + d));
        __m512i high = _mm512_setzero_si512();
        if (other) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, other + d));
        _mm512_mask_storeu_epi32(to + d, some, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

/* Tokens along the sum: to[pair of tokens][width]; an odd last one is paired with zeros. */
INLINE void along(uint32_t *to, const bf16 *x, long stride, const int64_t *row, long keys, long width) {
    for (long t = 0; t < keys; t += 2) {
        const bf16 *next = t + 1 < keys ? token_at(x, stride, row, t + 1) : 0;
        interleave(to + t / 2 * width, token_at(x, stride, row, t), next, width);
    }
}

INLINE float greatest(const float *x, long n) {
    __m512 low = _mm512_set1_ps(-INFINITY), most[4] = {low, low, low, low};
    long at = 0;
    for (; at + 64 <= n; at += 64)
        for (int j = 0; j < 4; j++) most[j] = _mm512_max_ps(most[j], _mm512_loadu_ps(x + at + 16 * j));
    for (; at < n; at += 16) most[0] = _mm512_max_ps(most[0], _mm512_mask_loadu_ps(low, first(n - at), x + at));
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
}

/* Rows of scores, of which row i sees `seen + i` keys (without `causal` all of them `seen`), become e^(scale (score -
   the greatest)) with zeros up to `columns`, in bf16 in `e` too; `share` is 1 over a row's sum. */
INLINE void soften(float *scores, long lds, bf16 *e, float *share, long rows, long seen, long causal, long columns,
                   float scale) {
    scale *= 1.44269504f;
    for (long i = 0; i < rows; i++, scores += lds, e += lds) {
        long n = causal ? seen + i : seen, at = 0;
        __m512 top = _mm512_set1_ps(greatest(scores, n) * scale), sum = _mm512_setzero_ps();
        for (; at < n; at += 16) {
            __m512 x = power(_mm512_fmsub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(scale), top));
            x = _mm512_maskz_mov_ps(first(n - at), x);
            sum = _mm512_add_ps(sum, x);
            _mm512_storeu_ps(scores + at, x);
            store_factor(e + at, x);
        }
        for (; at < columns; at += 16) {
            _mm512_storeu_ps(scores + at, _mm512_setzero_ps());
            _mm256_storeu_si256((__m256i *)(e + at), _mm256_setzero_si256());
        }
        share[i] = 1.f / _mm512_reduce_add_ps(sum);
    }
}

typedef struct { long own, before, keys, wide; } sizes;

/* Tokens of a row's queries, of its beginning, of both, and those in whole vectors. */
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

/* The next `bytes` of a room, in whole cache lines; `at` counts them. Without a room it only counts. */
INLINE void *take(char *room, long *at, long bytes) {
    char *here = room ? room + *at : 0;
    *at += up(bytes, 64);
    return here;
}

INLINE void copy_tile(bf16 *to, const bf16 *x, long token, long rows, long width) {
    memset(to, 0, (size_t)TILE * width * 2);
    for (long i = 0; i < rows; i++) memcpy(to + i * width, x + i * token, (size_t)width * 2);
}

/* A tile of queries: e^score of what they see of the keys, in float32 and in bf16, and 1 over its sums (see `soften`);
   how many columns that takes. */
INLINE long soft_tile(const shape *z, sizes s, const bf16 *q, long begin, long rows, const uint32_t *keys, bf16 *tile,
                      float *scores, bf16 *e, float *share) {
    long seen = z->causal ? s.before + begin + 1 : s.keys;
    long columns = z->causal ? up(seen + rows - 1, 16) : s.wide;
    copy_tile(tile, q, z->q.token, rows, z->width);
    product(columns, z->width / 2, (const uint32_t *)tile, z->width / 2, 1, keys, s.wide, scores, s.wide, 0);
    soften(scores, s.wide, e, share, rows, seen, z->causal, columns, z->scale);
    return columns;
}

/* P of a tile in bf16: what `soften` left in the scores, over its sums. */
INLINE void shares(const float *scores, long lds, const float *share, bf16 *p, long rows, long columns) {
    for (long i = 0; i < rows; i++)
        for (long at = 0; at < columns; at += 16) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + i * lds + at), _mm512_set1_ps(share[i]));
            store_factor(p + i * lds + at, x);
        }
}
