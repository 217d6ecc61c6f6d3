/* One step of AdamW and of the moving average over many arrays of type REAL. */
#include <stddef.h>
#include <stdint.h>
#include <tgmath.h>

typedef int64_t index_t;
#define LANES 16
#define EACH(i, count) _Pragma("GCC ivdep") for (index_t i = 0; i < (count); i++)

/* Write the sum of all squares in `count` arrays to `total`. */
void sum_squares(index_t count, const index_t *sizes, const REAL *const *arrays,
                 double *total)
{
    *total = 0;
    for (index_t k = 0; k < count; k++) {
        /* Many sums side by side keep the processor's vectors full. */
        REAL sums[LANES] = {0};
        const REAL *array = arrays[k];
        const index_t whole = sizes[k] - sizes[k] % LANES;
        for (index_t start = 0; start < whole; start += LANES)
            EACH(i, LANES) sums[i] += array[start + i] * array[start + i];
        for (index_t i = whole; i < sizes[k]; i++)
            sums[i - whole] += array[i] * array[i];
        for (index_t i = 0; i < LANES; i++)
            *total += sums[i];
    }
}

/* Step one array. `largest` is NULL without AMSGrad. */
static void step_array(index_t size, REAL *restrict weight, const REAL *restrict gradient,
                       REAL *restrict mean, REAL *restrict square, REAL *restrict largest,
                       REAL shrink, REAL factor, REAL beta1, REAL beta2, REAL eps,
                       REAL rate, REAL root)
{
    EACH(i, size) {
        const REAL slope = factor * gradient[i];
        mean[i] += (1 - beta1) * (slope - mean[i]);
        square[i] = beta2 * square[i] + (1 - beta2) * slope * slope;
        REAL second = square[i];
        if (largest != NULL)
            second = largest[i] = largest[i] > second ? largest[i] : second;
        weight[i] = shrink * weight[i] - rate * mean[i] / (sqrt(second) / root + eps);
    }
}

/* Step `count` arrays, whose gradients are multiplied by `factor`. `steps` counts the
 * steps of each array; `largest` is NULL without AMSGrad. */
void adamw(index_t count, const index_t *sizes, REAL *const *weights,
           const REAL *const *gradients, REAL *const *means, REAL *const *squares,
           REAL *const *largest, float *const *steps, double factor, double rate,
           double decay, double beta1, double beta2, double eps)
{
    for (index_t k = 0; k < count; k++) {
        const double step = *steps[k] += 1;
        step_array(sizes[k], weights[k], gradients[k], means[k], squares[k],
                   largest ? largest[k] : NULL, 1 - rate * decay, factor, beta1, beta2,
                   eps, rate / (1 - pow(beta1, step)), sqrt(1 - pow(beta2, step)));
    }
}

/* Move `count` averages towards the weights by the fraction `part` of the way. */
void move_averages(index_t count, const index_t *sizes, REAL *const *averages,
                   const REAL *const *weights, double part)
{
    const REAL fraction = part;
    for (index_t k = 0; k < count; k++) {
        REAL *restrict average = averages[k];
        const REAL *restrict weight = weights[k];
        EACH(i, sizes[k]) average[i] += fraction * (weight[i] - average[i]);
    }
}
