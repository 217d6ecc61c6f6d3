/* Sums of messages and gates of PaiNN in real numbers of type REAL.
 *
 * Arrays are contiguous: scalars (N, H), vectors (N, 3, H), the parts a, b, c of
 * messages side by side (N, 3H) and (P, 3H). Of P pairs of atoms all have an edge from
 * `source` to `target`, the first `mirrored` ones also the mirror image. `vec` is NULL
 * while all vectors are zero; then nothing reads or changes the part b.
 */
#include <stddef.h>
#include <stdint.h>
#include <tgmath.h>

typedef int64_t index_t;
/* No two channels share a number, so that loops over them need no order. */
#define EACH_CHANNEL _Pragma("GCC ivdep") for (index_t h = 0; h < H; h++)

/* Add the message of one edge to its target. `sign` is that of the direction. */
static void add_message(index_t H, const REAL *restrict y, const REAL *restrict filter,
                        const REAL *restrict vec, const REAL *direction, REAL sign,
                        REAL *restrict dx, REAL *restrict dvec)
{
    const REAL scale_b = 1 / sqrt(3.0 * H), scale_c = 1 / sqrt(1.0 * H);
    const REAL x_axis = sign * scale_c * direction[0];
    const REAL y_axis = sign * scale_c * direction[1];
    const REAL z_axis = sign * scale_c * direction[2];
    EACH_CHANNEL dx[h] += y[h] * filter[h];
    if (vec == NULL) {
        EACH_CHANNEL {
            const REAL c = y[2 * H + h] * filter[2 * H + h];
            dvec[h] += x_axis * c;
            dvec[H + h] += y_axis * c;
            dvec[2 * H + h] += z_axis * c;
        }
        return;
    }
    EACH_CHANNEL {
        const REAL b = scale_b * y[H + h] * filter[H + h];
        const REAL c = y[2 * H + h] * filter[2 * H + h];
        dvec[h] += vec[h] * b + x_axis * c;
        dvec[H + h] += vec[H + h] * b + y_axis * c;
        dvec[2 * H + h] += vec[2 * H + h] * b + z_axis * c;
    }
}

/* Add the messages of all edges to `dx` (N, H) and `dvec` (N, 3, H). */
void sum_messages(index_t P, index_t mirrored, index_t H, const index_t *source,
                  const index_t *target, const REAL *filters, const REAL *directions,
                  const REAL *y, const REAL *vec, REAL *dx, REAL *dvec)
{
    for (index_t p = 0; p < P; p++) {
        const index_t s = source[p], t = target[p];
        const REAL *filter = filters + 3 * H * p, *direction = directions + 3 * p;
        const REAL *vec_s = vec ? vec + 3 * H * s : NULL;
        const REAL *vec_t = vec ? vec + 3 * H * t : NULL;
        add_message(H, y + 3 * H * s, filter, vec_s, direction, 1, dx + H * t,
                    dvec + 3 * H * t);
        if (p < mirrored)
            add_message(H, y + 3 * H * t, filter, vec_t, direction, -1, dx + H * s,
                        dvec + 3 * H * s);
    }
}

/* Add what one edge contributes to the gradients of its source and its filter. */
static void add_gradients(index_t H, const REAL *restrict y, const REAL *restrict filter,
                          const REAL *restrict vec, const REAL *direction, REAL sign,
                          const REAL *restrict grad_dx, const REAL *restrict grad_dvec,
                          REAL *restrict grad_y, REAL *restrict grad_vec,
                          REAL *restrict grad_filter)
{
    const REAL scale_b = 1 / sqrt(3.0 * H), scale_c = 1 / sqrt(1.0 * H);
    const REAL x_axis = sign * scale_c * direction[0];
    const REAL y_axis = sign * scale_c * direction[1];
    const REAL z_axis = sign * scale_c * direction[2];
    EACH_CHANNEL {
        grad_filter[h] += grad_dx[h] * y[h];
        grad_y[h] += grad_dx[h] * filter[h];
    }
    EACH_CHANNEL {
        const REAL grad_c = x_axis * grad_dvec[h] + y_axis * grad_dvec[H + h]
                            + z_axis * grad_dvec[2 * H + h];
        grad_filter[2 * H + h] += grad_c * y[2 * H + h];
        grad_y[2 * H + h] += grad_c * filter[2 * H + h];
    }
    if (vec == NULL)
        return;
    EACH_CHANNEL {
        const REAL grad_b = scale_b * (vec[h] * grad_dvec[h]
                                       + vec[H + h] * grad_dvec[H + h]
                                       + vec[2 * H + h] * grad_dvec[2 * H + h]);
        const REAL b = scale_b * y[H + h] * filter[H + h];
        grad_filter[H + h] += grad_b * y[H + h];
        grad_y[H + h] += grad_b * filter[H + h];
        grad_vec[h] += b * grad_dvec[h];
        grad_vec[H + h] += b * grad_dvec[H + h];
        grad_vec[2 * H + h] += b * grad_dvec[2 * H + h];
    }
}

/* Add the gradients of `sum_messages` to those of `y`, `vec` and `filters`. */
void sum_messages_backward(index_t P, index_t mirrored, index_t H, const index_t *source,
                           const index_t *target, const REAL *filters,
                           const REAL *directions, const REAL *y, const REAL *vec,
                           const REAL *grad_dx, const REAL *grad_dvec, REAL *grad_y,
                           REAL *grad_vec, REAL *grad_filters)
{
    for (index_t p = 0; p < P; p++) {
        const index_t ends[2] = {source[p], target[p]};
        for (int way = 0; way < (p < mirrored ? 2 : 1); way++) {
            const index_t s = ends[way], t = ends[1 - way];
            add_gradients(H, y + 3 * H * s, filters + 3 * H * p,
                          vec ? vec + 3 * H * s : NULL, directions + 3 * p,
                          way ? -1 : 1, grad_dx + H * t, grad_dvec + 3 * H * t,
                          grad_y + 3 * H * s, vec ? grad_vec + 3 * H * s : NULL,
                          grad_filters + 3 * H * p);
        }
    }
}

/* With two vectors v1, v2 side by side in `v` (N, 3, 2H): `joined` (N, 2H) of x and the
 * length of v2, and `dot` (N, H), v1 * v2 / sqrt(H). */
void join_lengths(index_t N, index_t H, const REAL *restrict x, const REAL *restrict v,
                  REAL *restrict joined, REAL *restrict dot)
{
    const REAL scale = 1 / sqrt(1.0 * H);
    for (index_t n = 0; n < N; n++, x += H, v += 6 * H, joined += 2 * H, dot += H)
        EACH_CHANNEL {
            REAL product = 0, square = 0;
            for (index_t axis = 0; axis < 3; axis++) {
                const REAL one = v[2 * H * axis + h], two = v[2 * H * axis + H + h];
                product += one * two;
                square += two * two;
            }
            joined[h] = x[h];
            joined[H + h] = sqrt(square + (REAL)1e-8);
            dot[h] = product * scale;
        }
}

/* Add to `grad_x` and `grad_v` the gradients of `join_lengths`. */
void join_lengths_backward(index_t N, index_t H, const REAL *restrict v,
                           const REAL *restrict joined, const REAL *restrict grad_joined,
                           const REAL *restrict grad_dot, REAL *restrict grad_x,
                           REAL *restrict grad_v)
{
    const REAL scale = 1 / sqrt(1.0 * H);
    for (index_t n = 0; n < N; n++, v += 6 * H, joined += 2 * H, grad_joined += 2 * H,
                 grad_dot += H, grad_x += H, grad_v += 6 * H)
        EACH_CHANNEL {
            const REAL by_dot = grad_dot[h] * scale;
            const REAL by_length = grad_joined[H + h] / joined[H + h];
            grad_x[h] += grad_joined[h];
            for (index_t axis = 0; axis < 3; axis++) {
                const index_t one = 2 * H * axis + h, two = one + H;
                grad_v[one] += by_dot * v[two];
                grad_v[two] += by_dot * v[one] + by_length * v[two];
            }
        }
}

/* With `gates` p, q, r (N, 3H): new_x = x + (p + q dot) / sqrt(2) and
 * new_vec = vec + r v1. */
void gate(index_t N, index_t H, const REAL *restrict x,
          const REAL *restrict vec, const REAL *restrict v, const REAL *restrict dot,
          const REAL *restrict gates, REAL *restrict new_x, REAL *restrict new_vec)
{
    const REAL half = sqrt(0.5);
    for (index_t n = 0; n < N; n++, x += H, vec += 3 * H, v += 6 * H, dot += H,
                 gates += 3 * H, new_x += H, new_vec += 3 * H)
        EACH_CHANNEL {
            new_x[h] = x[h] + (gates[h] + gates[H + h] * dot[h]) * half;
            for (index_t axis = 0; axis < 3; axis++)
                new_vec[H * axis + h] = vec[H * axis + h]
                                        + gates[2 * H + h] * v[2 * H * axis + h];
        }
}

/* Write the gradients of `gate`, apart from those of `x` and `vec`, which are
 * `grad_x` and `grad_vec`. */
void gate_backward(index_t N, index_t H, const REAL *restrict v,
                   const REAL *restrict dot, const REAL *restrict gates,
                   const REAL *restrict grad_x, const REAL *restrict grad_vec,
                   REAL *restrict grad_v, REAL *restrict grad_dot,
                   REAL *restrict grad_gates)
{
    const REAL half = sqrt(0.5);
    for (index_t n = 0; n < N; n++, v += 6 * H, dot += H, gates += 3 * H,
                 grad_x += H, grad_vec += 3 * H, grad_v += 6 * H, grad_dot += H,
                 grad_gates += 3 * H)
        EACH_CHANNEL {
            const REAL grad = grad_x[h] * half;
            REAL by_r = 0;
            grad_gates[h] = grad;
            grad_gates[H + h] = grad * dot[h];
            grad_dot[h] = grad * gates[H + h];
            for (index_t axis = 0; axis < 3; axis++) {
                by_r += grad_vec[H * axis + h] * v[2 * H * axis + h];
                grad_v[2 * H * axis + h] = grad_vec[H * axis + h] * gates[2 * H + h];
                grad_v[2 * H * axis + H + h] = 0;
            }
            grad_gates[2 * H + h] = by_r;
        }
}
