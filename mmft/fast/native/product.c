/* out = sum of A_i B_i (+ bias), in bfloat16 from sums in float32: what a layer with its adapter is, in one pass.

   Threads share panels and tiles in their order, so that a value is computed in the same way whatever their number. */
#include "product.h"

/* `room`: panels for the threads, `each` values of 4 bytes apart. */
void mmft_product(const term *terms, long count, long across, const bf16 *bias, bf16 *out, long rows, long columns,
                  uint32_t *room, long each, long threads) {
    job all = {terms, count, across, rows, columns, columns, bias, out};
#pragma omp parallel num_threads(threads)
    share(&all, room + omp_get_thread_num() * each, omp_get_thread_num(), omp_get_num_threads(), 0, 0);
}
