/* Linear layers of one input with their adapters, and the gated block of three of them: all products of a node of the
   graph in one call, forward and backward. Threads meet where one needs what others made.

   y_i = x W_i^T + b_i + (x A_i^T) B_i^T (B with its scaling in it), the A stacked; with t = x A^T and d_i = dy_i B_i:
   dx = sum dy_i W_i + d A, dA = d^T x, dB_i = scale_i dy_i^T t_i. Gradients of A and B are float32 sums. */
#include "gate.h"
#include "product.h"

enum { MOST = 7 };
typedef struct {
    const bf16 *weight, *bias, *b, *given; /* (columns, width), (columns), (columns, rank), (rows, columns) */
    bf16 *out;                             /* (rows, columns) */
    float *db;                             /* (columns, rank) */
    int64_t columns, rank;
    float scale;
} line;
typedef struct {
    const bf16 *x, *a;             /* (rows, width), (ranks, width) */
    bf16 *narrow, *steep, *turned; /* (rows, ranks) twice; steep and narrow as columns, of an even number of rows */
    bf16 *dx;                      /* (rows, width) or nothing */
    float *da;                     /* (ranks, width) */
    const line *lines;
    int64_t rows, width, ranks, count;
} stack;
typedef struct { uint32_t *panel; long here, all; } place;
/* What a gated block does between its layers, tile by tile; `given`: the product's gradient, or nothing. */
typedef struct { const bf16 *gate, *up, *given; bf16 *product, *to_gate, *to_up; int64_t columns; } gates;

/* Brings what `open_tile` will read and write nearer. */
static void fetch_tile(const void *more, long row, long end, long column) {
    const gates *g = more;
    long wide = g->columns - column < PANEL ? g->columns - column : PANEL;
    for (; row < end; row++)
        for (long at = row * g->columns + column, last = at + wide; at < last; at += 32) {
            __builtin_prefetch(g->gate + at);
            if (!g->given) continue;
            __builtin_prefetch(g->up + at);
            __builtin_prefetch(g->to_gate + at, 1);
        }
}

static void open_tile(const void *more, long row, long end, long column) {
    const gates *g = more;
    for (; row < end; row++)
        for (long at = column; at < column + PANEL && at < g->columns; at += 16) {
            __mmask16 some = first(g->columns - at);
            long here = row * g->columns + at;
            __m512 gate = load_some(g->gate + here, some), up = load_some(g->up + here, some), left, right;
            if (g->given) {
                __m512 product = gated_back(gate, up, load_some(g->given + here, some), &left, &right);
                store_some(g->product + here, product, some);
                store_some(g->to_gate + here, left, some);
                store_some(g->to_up + here, right, some);
            } else store_some(g->product + here, gated(gate, up), some);
        }
}

/* t = x A^T. */
static void to_narrow(const stack *s, place p) {
    term one = {s->x, s->a, s->width, s->width, s->width};
    job made = {&one, 1, 1, s->rows, s->ranks, s->ranks, 0, s->narrow};
    share(&made, p.panel, p.here, p.all, 0);
}

/* The outputs; `open` follows the tiles of the last. */
static void to_outs(const stack *s, place p, const gates *open) {
    long at = 0;
    beside with = {fetch_tile, open_tile, open};
    for (const line *l = s->lines; l < s->lines + s->count; at += l++->rank) {
        term both[2] = {{s->x, l->weight, s->width, s->width, s->width},
                        {s->narrow + at, l->b, s->ranks, l->rank, l->rank}};
        job made = {both, 2, 1, s->rows, l->columns, l->columns, l->bias, l->out};
        share(&made, p.panel, p.here, p.all, open && l + 1 == s->lines + s->count ? &with : 0);
    }
}

/* d_i = dy_i B_i. */
static void to_steep(const stack *s, place p) {
    long at = 0;
    for (const line *l = s->lines; l < s->lines + s->count; at += l++->rank) {
        term one = {l->given, l->b, l->columns, l->rank, l->columns};
        job made = {&one, 1, 0, s->rows, l->rank, s->ranks, 0, s->steep + at};
        share(&made, p.panel, p.here, p.all, 0);
    }
}

/* Rows of d and t as columns, a zero behind an odd last one. */
static void to_turned(const stack *s, place p) {
    long even = (s->rows + 1) / 2 * 2;
    for (long row = even * p.here / p.all; row < even * (p.here + 1) / p.all; row++)
        for (long r = 0; r < s->ranks; r++) {
            s->turned[r * even + row] = row < s->rows ? s->steep[row * s->ranks + r] : 0;
            s->turned[(s->ranks + r) * even + row] = row < s->rows ? s->narrow[row * s->ranks + r] : 0;
        }
}

/* dx, and with `open` what follows from its tiles. */
static void to_input(const stack *s, place p, const gates *open) {
    term terms[MOST + 1];
    for (long i = 0; i < s->count; i++) {
        const line *l = s->lines + i;
        terms[i] = (term){l->given, l->weight, l->columns, s->width, l->columns};
    }
    terms[s->count] = (term){s->steep, s->a, s->ranks, s->width, s->ranks};
    job made = {terms, s->count + 1, 0, s->rows, s->width, s->width, 0, s->dx};
    beside with = {fetch_tile, open_tile, open};
    if (s->dx) share(&made, p.panel, p.here, p.all, open ? &with : 0);
}

/* dA and dB. */
static void to_adapters(const stack *s, place p) {
    long even = (s->rows + 1) / 2 * 2, at = s->ranks;
    term one = {s->turned, s->x, even, s->width, s->rows};
    job made = {&one, 1, 0, s->ranks, s->width, s->width, 0, 0, s->da, 1.f, 1};
    share(&made, p.panel, p.here, p.all, 0);
    for (const line *l = s->lines; l < s->lines + s->count; at += l++->rank) {
        one = (term){s->turned + at * even, l->given, even, l->columns, s->rows};
        made = (job){&one, 1, 0, l->rank, l->columns, 1, 0, 0, l->db, l->scale, l->rank};
        share(&made, p.panel, p.here, p.all, 0);
    }
}

static place here(uint32_t *room, long each) {
    place p = {room + omp_get_thread_num() * each, omp_get_thread_num(), omp_get_num_threads()};
    return p;
}

/* Outputs of all lines. `room`: panels for the threads, `each` values of 4 bytes apart. */
void mmft_lines(const stack *s, uint32_t *room, long each, long threads) {
#pragma omp parallel num_threads(threads)
    {
        place p = here(room, each);
        to_narrow(s, p);
#pragma omp barrier
        to_outs(s, p, 0);
    }
}

void mmft_lines_back(const stack *s, uint32_t *room, long each, long threads) {
#pragma omp parallel num_threads(threads)
    {
        place p = here(room, each);
        to_steep(s, p);
#pragma omp barrier
        to_turned(s, p);
#pragma omp barrier
        to_input(s, p, 0);
        to_adapters(s, p);
    }
}

/* down(silu(gate) * up): `one` are gate and up, whose product is the input of `two`. */
void mmft_gated(const stack *one, const stack *two, const gates *open, uint32_t *room, long each, long threads) {
#pragma omp parallel num_threads(threads)
    {
        place p = here(room, each);
        to_narrow(one, p);
#pragma omp barrier
        to_outs(one, p, open);
#pragma omp barrier
        to_narrow(two, p);
#pragma omp barrier
        to_outs(two, p, 0);
    }
}

void mmft_gated_back(const stack *one, const stack *two, const gates *open, uint32_t *room, long each, long threads) {
#pragma omp parallel num_threads(threads)
    {
        place p = here(room, each);
        to_steep(two, p);
#pragma omp barrier
        to_turned(two, p);
        to_input(two, p, open);
#pragma omp barrier
        to_adapters(two, p);
        to_steep(one, p);
#pragma omp barrier
        to_turned(one, p);
#pragma omp barrier
        to_input(one, p, 0);
        to_adapters(one, p);
    }
}
