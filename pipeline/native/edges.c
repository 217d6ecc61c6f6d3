/* Pairs of edges, their geometry and radial basis, in real numbers of type REAL.
 *
 * Edges are sorted by target and distinct: `source` and `target` (E), `offsets` (E, 3)
 * of the source's cell. Of P pairs, `edge` (P) is one edge each.
 */
#include <stddef.h>
#include <stdint.h>
#include <tgmath.h>

typedef int64_t index_t;

/* The edge from `source` among [begin, end) whose offset is minus `offset`, or -1. */
static index_t find_edge(index_t begin, index_t end, const index_t *sources,
                         const REAL *offsets, index_t source, const REAL *offset)
{
    for (index_t e = begin; e < end; e++)
        if (sources[e] == source && offsets[3 * e] == -offset[0]
            && offsets[3 * e + 1] == -offset[1] && offsets[3 * e + 2] == -offset[2])
            return e;
    return -1;
}

/* Write one edge of each pair to `edge`, those with a mirror image first, and to
 * `counts` the numbers of pairs with and without one. `first` (N + 1) and `mirror` (E)
 * are for notes. Both counts are -1 if edges are not sorted by target. */
void find_pairs(index_t E, index_t N, const index_t *source, const index_t *target,
                const REAL *offsets, index_t *first, index_t *mirror, index_t *edge,
                index_t *counts)
{
    index_t atom = 0, mirrored = 0, alone = 0;
    counts[0] = counts[1] = -1;
    for (index_t e = 0; e < E; e++) {
        if (e > 0 && target[e] < target[e - 1])
            return;
        while (atom <= target[e])
            first[atom++] = e;
        mirror[e] = -1;
    }
    while (atom <= N)
        first[atom++] = E;
    for (index_t e = 0; e < E; e++) {
        const index_t s = source[e];
        if (mirror[e] >= 0 || s < target[e])
            continue;
        const index_t other = find_edge(first[s], first[s + 1], source, offsets,
                                        target[e], offsets + 3 * e);
        if (other < 0 || other == e)
            continue;
        mirror[e] = other;
        mirror[other] = e;
        edge[mirrored++] = e;
    }
    for (index_t e = 0; e < E; e++)
        if (mirror[e] < 0)
            edge[mirrored + alone++] = e;
    counts[0] = mirrored;
    counts[1] = alone;
}

/* Write ends, length and direction of the P edges `edge`, from target to source.
 * `cells` (B, 3, 3) belong to the structures that `structure` (N) numbers. */
void pair_geometry(index_t P, const index_t *edge, const index_t *source,
                   const index_t *target, const REAL *offsets, const REAL *positions,
                   const REAL *cells, const index_t *structure, double tiny,
                   index_t *pair_source, index_t *pair_target, REAL *length,
                   REAL *direction)
{
    for (index_t p = 0; p < P; p++) {
        const index_t s = source[edge[p]], t = target[edge[p]];
        const REAL *offset = offsets + 3 * edge[p], *cell = cells + 9 * structure[t];
        const REAL smallest = tiny;
        REAL vector[3], square = 0;
        for (int axis = 0; axis < 3; axis++) {
            const REAL shift = offset[0] * cell[axis] + offset[1] * cell[3 + axis]
                               + offset[2] * cell[6 + axis];
            vector[axis] = positions[3 * s + axis] - positions[3 * t + axis] + shift;
            square += vector[axis] * vector[axis];
        }
        length[p] = sqrt(square > smallest ? square : smallest);
        for (int axis = 0; axis < 3; axis++)
            direction[3 * p + axis] = vector[axis] / length[p];
        pair_source[p] = s;
        pair_target[p] = t;
    }
}

/* Write the exponents (P, K) of Gaussians on `centres` (K) of length / cutoff. */
void gaussian_exponents(index_t P, index_t K, double cutoff, double width,
                        const REAL *restrict length, const REAL *restrict centres,
                        REAL *restrict exponents)
{
    const REAL unit = cutoff, deviation = width, lowest = -50;
    for (index_t p = 0; p < P; p++, exponents += K) {
        const REAL x = length[p] / unit;
        for (index_t k = 0; k < K; k++) {
            const REAL y = (x - centres[k]) / deviation;
            const REAL exponent = (REAL)-0.5 * y * y;
            exponents[k] = exponent > lowest ? exponent : lowest;
        }
    }
}

/* Write `basis` (P, K + 1): Gaussians (P, K) under the envelope, then a column of
 * ones, or the envelope if `smooth`. Gaussians of at most `negligible` become zero. */
void envelop(index_t P, index_t K, index_t power, index_t smooth, double cutoff,
             double negligible, const REAL *restrict length, const REAL *restrict gaussians,
             REAL *restrict basis)
{
    const REAL unit = cutoff, smallest = negligible, one = 1;
    const REAL a = -(power + 1.0) * (power + 2.0) / 2, b = power * (power + 2.0);
    const REAL c = -power * (power + 1.0) / 2;
    for (index_t p = 0; p < P; p++, gaussians += K, basis += K + 1) {
        const REAL x = length[p] / unit;
        REAL value = 1;
        for (index_t i = 0; i < power; i++)
            value *= x;
        value = x < one ? 1 + value * (a + x * (b + x * c)) : 0;
        for (index_t k = 0; k < K; k++)
            basis[k] = gaussians[k] > smallest ? value * gaussians[k] : 0;
        basis[K] = smooth ? value : one;
    }
}
