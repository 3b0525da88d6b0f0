/* out = act(sum of A_i B_i (+ bias)), in bfloat16 from sums in float32: a layer with its adapter, or one with what
   follows it, in one pass.

   Threads share panels and tiles in their order, so that a value is computed in the same way whatever their number. */
#include "acts.h"
#include "product.h"

typedef struct { const job *made; long act; } following;

/* The act takes the place of a tile that was just written. */
INLINE void act_rows(const int act, const job *j, long row, long end, long column) {
    long wide = j->columns - column < PANEL ? j->columns - column : PANEL;
    for (; row < end; row++) {
        bf16 *x = j->out + row * j->ldo + column;
        for (long at = 0; wide == PANEL && at < PANEL; at += 16) store(x + at, acted(act, load(x + at)));
        for (long at = 0; wide < PANEL && at < wide; at += 16) {
            __mmask16 some = first(wide - at);
            store_some(x + at, acted(act, load_some(x + at, some)), some);
        }
    }
}

static void act_tile(const void *more, long row, long end, long column) {
    const following *f = more;
    if (f->act == TANH_GELU) act_rows(TANH_GELU, f->made, row, end, column);
    else if (f->act == ERF_GELU) act_rows(ERF_GELU, f->made, row, end, column);
    else if (f->act == QUICK_GELU) act_rows(QUICK_GELU, f->made, row, end, column);
    else act_rows(RELU, f->made, row, end, column);
}

/* `room`: panels for the threads, `each` values of 4 bytes apart. */
void mmft_product(const term *terms, long count, long across, const bf16 *bias, long act, bf16 *out, long rows,
                  long columns, uint32_t *room, long each, long threads) {
    job all = {terms, count, across, rows, columns, columns, bias, out};
    following after = {&all, act};
    beside with = {0, act_tile, &after};
#pragma omp parallel num_threads(threads)
    share(&all, room + omp_get_thread_num() * each, omp_get_thread_num(), omp_get_num_threads(),
          act == NOTHING ? 0 : &with);
}
