/* Attention of rows of a line, forward (see attention.h). */
#include "attention.h"

typedef struct {
    uint32_t *keys, *values;
    float *scores, *made;
    bf16 *tile, *e;
} desk;

/* The arrays of a thread in its room; how many bytes they take. */
static long lay(desk *on, char *room, const shape *z, long most) {
    long at = 0;
    on->keys = take(room, &at, z->width / 2 * most * 4);
    on->values = take(room, &at, most / 2 * z->out_width * 4);
    on->scores = take(room, &at, TILE * most * 4);
    on->made = take(room, &at, TILE * z->out_width * 4);
    on->tile = take(room, &at, TILE * z->width * 2);
    on->e = take(room, &at, TILE * most * 2);
    return at;
}

/* Bytes of room that `mmft_attend` needs for each thread. */
long mmft_attend_room(const shape *z, const int64_t *table) {
    desk on;
    return lay(&on, 0, z, longest(z, table));
}

/* One head of a row: out = P V = share (e^score V), a tile of queries after another; `kept` (or nothing) gets P. */
INLINE void attend_head(const shape *z, const int64_t *row, sizes s, const bf16 *q, bf16 *out, bf16 *kept,
                        const desk *on) {
    long wide = z->out_width;
    for (long at = 0; at < s.own; at += TILE) {
        long n = s.own - at < TILE ? s.own - at : TILE, seen = z->causal ? s.before + at + n : s.keys;
        float share[TILE];
        const bf16 *queries = q + (row[0] + at) * z->q.token;
        long columns = soft_tile(z, s, queries, at, n, on->keys, on->tile, on->scores, on->e, share);
        if (kept) shares(on->scores, s.wide, share, kept + at * s.wide, n, columns);
        const uint32_t *pairs = (const uint32_t *)on->e;
        product(wide, (seen + 1) / 2, pairs, s.wide / 2, 1, on->values, wide, on->made, wide, 0);
        bf16 *to = out + (row[0] + at) * z->out.token;
        for (long i = 0; i < n; i++)
            for (long d = 0; d < wide; d += 16) {
                __m512 sum = _mm512_loadu_ps(on->made + i * wide + d);
                store(to + i * z->out.token + d, _mm512_mul_ps(sum, _mm512_set1_ps(share[i])));
            }
    }
}

void mmft_attend(const shape *z, const int64_t *table, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out,
                 bf16 *kept, char *room, long bytes) {
    long most = longest(z, table), shared = z->heads / z->groups;
#pragma omp parallel num_threads(z->threads)
    {
        desk on;
        lay(&on, room + omp_get_thread_num() * bytes, z, most);
#pragma omp for schedule(dynamic) collapse(2)
        for (long r = 0; r < z->rows; r++)
            for (long h = 0; h < z->groups; h++) {
                const int64_t *row = table + r * ROW;
                sizes s = sizes_of(row);
                across(on.keys, s.wide, k + h * z->k.head, z->k.token, row, s.keys, z->width);
                along(on.values, v + h * z->v.head, z->v.token, row, s.keys, z->out_width);
                for (long head = h * shared; head < (h + 1) * shared; head++) {
                    bf16 *p = kept ? kept + row[4] + head * s.own * s.wide : 0;
                    attend_head(z, row, s, q + head * z->q.head, out + head * z->out.head, p, &on);
                }
            }
    }
}
