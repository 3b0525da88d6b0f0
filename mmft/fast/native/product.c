/* out = act(sum of A_i B_i (+ bias)), in bfloat16 from sums in float32: a layer with its adapter, or one with what
   follows it, in one pass.

   Threads share panels and tiles in their order, so that a value is computed in the same way whatever their number. */
#include "acts.h"
#include "product.h"

typedef struct { const job *made; long act; } following;

/* The act takes the place of a tile that was just written. */
static void act_tile(const void *more, long row, long end, long column) {
    const following *f = more;
    const job *j = f->made;
    for (; row < end; row++)
        for (long at = column; at < column + PANEL && at < j->columns; at += 16) {
            __mmask16 some = first(j->columns - at);
            bf16 *x = j->out + row * j->ldo + at;
            store_some(x, acted(f->act, load_some(x, some)), some);
        }
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
