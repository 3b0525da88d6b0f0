/* Products of bfloat16 in panels and tiles: out = sum of A_i B_i, summed in float32.

   Columns are taken PANEL at a time: the terms' B become one packed panel (pairs along the sum, columns), which stays
   in the second cache while all rows pass by in tiles of TILE. */
#include "vectors.h"
#include <omp.h>

enum { TILE = 6, TALL = 12, PANEL = 64 };
/* B is (columns, depth) where `across`, else (depth, columns); rows lie `lda` and `ldb` apart. `depth` is even; where
   it is not, B is not `across`, and rows of A end with a zero behind it. */
typedef struct { const bf16 *a, *b; int64_t lda, ldb, depth; } term;

/* 16 x 16 values of 4 bytes, rows to columns. */
INLINE void turn(uint32_t *to, long ldt, const uint32_t *from, long ldf, long columns, long pairs) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++)
        x[i] = i < columns ? _mm512_maskz_loadu_epi32(first(pairs), from + i * ldf) : _mm512_setzero_si512();
    turned(x, y);
    for (int i = 0; i < 16 && i < pairs; i++) _mm512_storeu_si512(to + i * ldt, y[i]);
}

enum { AHEAD = 32 };
/* Columns from `at` on of a term's B, as pairs along the sum; zeros behind the last column. What comes AHEAD rows later
   is asked for meanwhile: it lies in other pages, where the processor does not look ahead by itself. */
static void pack(uint32_t *to, const term *t, long at, long columns, int across) {
    long wide = columns < PANEL ? columns : PANEL;
    if (across) {
        for (long j = 0; j < PANEL; j += 16)
            for (long k = 0; k < t->depth; k += 32) {
                const uint32_t *from = (const uint32_t *)(t->b + (at + j) * t->ldb + k);
                turn(to + k / 2 * PANEL + j, PANEL, from, t->ldb / 2, wide - j, (t->depth - k + 1) / 2);
            }
        return;
    }
    __m512i count = _mm512_mullo_epi32(steps(1), _mm512_set1_epi32(0x10001)); /* 0, 0, 1, 1, … */
    __m512i low = _mm512_or_si512(count, _mm512_set1_epi32(0x200000));        /* 0, 32, 1, 33, … */
    __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (long k = 0; k < t->depth; k += 2, to += PANEL)
        for (long j = 0; j < PANEL; j += 32) {
            __mmask32 some = wide - j >= 32 ? 0xffffffff : wide > j ? (1u << (wide - j)) - 1 : 0;
            const bf16 *from = t->b + k * t->ldb + at + j;
            _mm_prefetch((const char *)(from + AHEAD * t->ldb), _MM_HINT_T0);
            _mm_prefetch((const char *)(from + (AHEAD + 1) * t->ldb), _MM_HINT_T0);
            __m512i one = _mm512_maskz_loadu_epi16(some, from);
            __m512i next = _mm512_maskz_loadu_epi16(k + 1 < t->depth ? some : 0, from + t->ldb);
            _mm512_storeu_si512(to + j, _mm512_permutex2var_epi16(one, low, next));
            _mm512_storeu_si512(to + j + 16, _mm512_permutex2var_epi16(one, high, next));
        }
}

/* Sums of a tile: `tall` rows (the last one again where there are fewer) and 16 * wide columns. */
INLINE void sums(const int tall, const int wide, const term *terms, long count, const uint32_t *panel, long row,
                 long rows, const bf16 *bias, long columns, __m512 sum[TALL][4]) {
    for (int i = 0; i < tall; i++)
        for (int j = 0; j < wide; j++)
            sum[i][j] = bias ? load_some(bias + 16 * j, first(columns - 16 * j)) : _mm512_setzero_ps();
    for (const term *t = terms; t < terms + count; t++) {
        const uint32_t *a[TALL];
        for (int i = 0; i < tall; i++)
            a[i] = (const uint32_t *)(t->a + (row + (i < rows ? i : rows - 1)) * t->lda);
        for (long k = 0; k < (t->depth + 1) / 2; k++, panel += PANEL) {
            __m512bh right[4];
            for (int j = 0; j < wide; j++) right[j] = (__m512bh)_mm512_loadu_si512(panel + 16 * j);
            for (int i = 0; i < tall; i++) {
                __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[i][k]);
                for (int j = 0; j < wide; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
            }
        }
    }
}

/* A product: `out` in bfloat16, rows `ldo` apart, or `wider` in float32 times `scale`, values of a row `step` apart. */
typedef struct {
    const term *terms;
    int64_t count, across, rows, columns, ldo;
    const bf16 *bias;
    bf16 *out;
    float *wider, scale;
    int64_t step, add; /* `add`: onto what is in `wider` */
} job;

/* A tile of it. */
INLINE void tile(const int tall, const int wide, const job *j, const uint32_t *panel, long row, long column) {
    long rows = j->rows - row, columns = j->columns - column;
    __m512 sum[TALL][4];
    sums(tall, wide, j->terms, j->count, panel, row, rows, j->bias ? j->bias + column : 0, columns, sum);
    for (int i = 0; i < tall && i < rows; i++)
        for (int at = 0; at < wide; at++) {
            __mmask16 some = first(columns - 16 * at);
            __m512 value = _mm512_mul_ps(sum[i][at], _mm512_set1_ps(j->scale));
            float *to = j->wider + (row + i) * j->ldo + (column + 16 * at) * j->step;
            if (j->add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, to));
            if (!j->wider) store_some(j->out + (row + i) * j->ldo + column + 16 * at, sum[i][at], some);
            else if (j->step == 1) _mm512_mask_storeu_ps(to, some, value);
            else _mm512_mask_i32scatter_ps(to, some, steps(j->step), value, 4);
        }
}

/* Few columns are taken with more rows, so that there are sums enough to go on with while one is being added to. */
INLINE long high_of(const job *j) { return j->columns <= 32 ? TALL : TILE; }
INLINE long tiles_of(const job *j) { return (j->rows + high_of(j) - 1) / high_of(j); }
INLINE long panels_of(const job *j) { return (j->columns + PANEL - 1) / PANEL; }

/* Brings part `part` of `parts` of the B of columns from `column` on nearer, while others are computed with. */
static void fetch(const job *j, long column, long part, long parts) {
    long wide = j->columns - column < PANEL ? j->columns - column : PANEL;
    for (const term *t = j->terms; t < j->terms + j->count; t++) {
        long lines = j->across ? wide : t->depth, bytes = 2 * (j->across ? t->depth : wide);
        const char *from = (const char *)(t->b + (j->across ? column * t->ldb : column));
        for (long i = lines * part / parts; i < lines * (part + 1) / parts; i++)
            for (long at = 0; at < bytes; at += 64) _mm_prefetch(from + 2 * i * t->ldb + at, _MM_HINT_T1);
    }
}

/* What goes on beside a product: `before` (or nothing) and `after` each tile of rows up to `end`. */
typedef void step_beside(const void *more, long row, long end, long column);
typedef struct { step_beside *before, *after; const void *more; } beside;

/* Those of its tiles that are thread `here`'s of `all`. */
static void share(const job *j, uint32_t *panel, long here, long all, const beside *with) {
    long tiles = tiles_of(j), panels = panels_of(j), packed = -1, end = panels * tiles * (here + 1) / all;
    for (long at = panels * tiles * here / all; at < end; at++) {
        long column = at / tiles * PANEL, row = at % tiles * high_of(j), left = j->columns - column;
        long low = row + high_of(j) < j->rows ? row + high_of(j) : j->rows;
        if (column != packed) {
            uint32_t *to = panel;
            for (const term *t = j->terms; t < j->terms + j->count; to += (t++->depth + 1) / 2 * PANEL)
                pack(to, t, column, left, j->across);
            packed = column;
        }
        if (left > PANEL && at - at % tiles + tiles < end) fetch(j, column + PANEL, at % tiles, tiles);
        if (with && with->before) with->before(with->more, row, low, column);
        if (j->columns <= 16) tile(TALL, 1, j, panel, row, column);
        else if (j->columns <= 32) tile(TALL, 2, j, panel, row, column);
        else if (left > 48) tile(TILE, 4, j, panel, row, column);
        else if (left > 32) tile(TILE, 3, j, panel, row, column);
        else if (left > 16) tile(TILE, 2, j, panel, row, column);
        else tile(TILE, 1, j, panel, row, column);
        if (with) with->after(with->more, row, low, column);
    }
}
