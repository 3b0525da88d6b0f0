/* out = sum of A_i B_i (+ bias), in bfloat16 from sums in float32: what a layer with its adapter is, in one pass.

   Threads share panels and tiles in their order, so that a value is computed in the same way whatever their number. */
#include "product.h"

/* `room`: panels for the threads, `each` values of 4 bytes apart. */
void mmft_product(const term *terms, long count, long across, const bf16 *bias, bf16 *out, long rows, long columns,
                  uint32_t *room, long each, long threads) {
    long ldo = columns, tiles = (rows + TILE - 1) / TILE, panels = (columns + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
    {
        long here = omp_get_thread_num(), all = omp_get_num_threads(), packed = -1;
        long begin = panels * tiles * here / all, end = panels * tiles * (here + 1) / all;
        uint32_t *panel = room + here * each;
        for (long at = begin; at < end; at++) {
            long column = at / tiles * PANEL, row = at % tiles * TILE, left = columns - column;
            if (column != packed) {
                uint32_t *to = panel;
                for (long i = 0; i < count; to += terms[i++].depth / 2 * PANEL)
                    pack(to, terms + i, column, left, across);
                packed = column;
            }
            bf16 *into = out + row * ldo + column;
            const bf16 *with = bias ? bias + column : NULL;
            if (left > 48) tile(4, terms, count, panel, row, rows - row, with, into, ldo, left);
            else if (left > 32) tile(3, terms, count, panel, row, rows - row, with, into, ldo, left);
            else if (left > 16) tile(2, terms, count, panel, row, rows - row, with, into, ldo, left);
            else tile(1, terms, count, panel, row, rows - row, with, into, ldo, left);
        }
    }
}
