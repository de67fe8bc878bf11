/* Computes model.py's Transformer on a CPU, for one or a few new tokens per row, in float32. With -DBFLOAT16, weights
   and caches are in bfloat16, which takes half as long to read.

   In such small steps, PyTorch spends more time on calling its operations than on arithmetic, and its products of a
   few rows with a matrix are slow. decode.py compiles this file and calls it. Weights and caches stay in PyTorch's
   memory. A matrix is (out, in), row by row.

   All widths are multiples of 16. Axes: B rows, T new tokens of each, N = B T, C channels, H query heads, K key-value
   heads, D head_dim, F n_hidden, S key positions that a token sees. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16, ROWS = 4, OUTS = 6, MANY = 2 };  /* a tile's sums fit into the registers */
#else
enum { LANES = 8, ROWS = 2, OUTS = 6, MANY = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* number: the stored type of weights and caches. get and put convert it from and to floats. */
#ifdef BFLOAT16
typedef uint16_t number;  /* the upper half of a float */
typedef uint16_t numbers __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline vec get(const number *p)
{
#if defined __AVX512F__  /* one instruction; GCC makes four of the last form */
    return (vec)((ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)) << 16);
#elif defined __AVX2__
    return (vec)((ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)) << 16);
#else
    return (vec)(__builtin_convertvector(*(const numbers *)p, ints) << 16);
#endif
}
static inline void put(number *p, vec v)
{
    const ints bits = (ints)v, odd = bits >> 16 & 1;
    *(numbers *)p = __builtin_convertvector((bits + 0x7fff + odd) >> 16, numbers);  /* to nearest, ties to even */
}
static inline float get_one(const number *p)
{
    const uint32_t bits = (uint32_t)*p << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
#else
typedef float number;

static inline vec get(const number *p) { return *(const vec *)p; }
static inline void put(number *p, vec v) { *(vec *)p = v; }
static inline float get_one(const number *p) { return *p; }
#endif

typedef struct { const number *weight, *bias; } Layer;  /* a norm or a linear layer; a bias may be missing */

typedef struct {
    Layer ln_1, q_proj, k_proj, v_proj, o_proj, ln_x, cross_q_proj, cross_o_proj, ln_2, up_proj, gate_proj, down_proj;
    number *keys, *values;  /* (B, K, slots, D) */
    const number *memory_keys, *memory_values;  /* of the cross-attention: (B, K, n_memory, D); NULL without it */
} Block;

enum { GELU, GEGLU, SWIGLU, RELU2, RELU };
enum { LAYERNORM, RMSNORM, PLAIN_RMSNORM };

typedef struct {
    const Block *blocks;
    Layer ln_f;  /* may be missing */
    const uint8_t *visible;  /* (B, n_memory): 0 hides a position of the memory; NULL: all are visible */
    float *x, *y, *q, *k, *v, *hidden, *gates, *scores;
    /* Buffers for the largest N: (N, C), (N, the larger of C and H D), (N, H D), (N, K D) twice, (N, F) twice, and
       (N, H, n_scores), where n_scores is the larger of slots and n_memory, rounded up to a multiple of 16. */
    int32_t n_layer, n_embd, n_head, n_kv_head, head_dim, n_hidden, slots, n_memory, n_scores, norm, mlp, post_norm;
    float eps;
} Trunk;

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec pick(ints mask, vec a, vec b) { return (vec)((mask & (ints)a) | (~mask & (ints)b)); }

static inline float sum(vec v)
{
    quad parts[LANES / 4], total = {0};
    memcpy(parts, &v, sizeof v);
    for (int i = 0; i < LANES / 4; i++)
        total += parts[i];
    return (total[0] + total[2]) + (total[1] + total[3]);
}

/* e^x with a relative error of about 1e-7. x is clamped to [-87, 87]. */
static inline vec exponential(vec x)
{
    const vec most = (vec){0} + 87, shift = (vec){0} + 12582912;  /* 1.5 * 2^23: adding it rounds to an integer */
    x = pick(x > most, most, pick(x < -most, -most, x));
    const vec n = (x * 1.44269504f + shift) - shift;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  /* x - n ln 2, within +-0.35 */
    const vec p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return p * (vec)((__builtin_convertvector(n, ints) + 127) << 23);  /* p * 2^n */
}

/* The tanh form of GELU: x / (1 + e^(-2 sqrt(2 / pi) (x + 0.044715 x^3))). */
static inline vec gelu(vec x)
{
    return x / (1 + exponential(x * (-1.59576912f - 0.07135481f * x * x)));
}

/* x times its sigmoid. */
static inline vec silu(vec x)
{
    return x / (1 + exponential(-x));
}

/* y[r][o] = x[r] . w[o] (+ bias[o]) (+ y[r][o] if add), for `rows` rows of x and `outs` rows of w, all of length n. */
static inline __attribute__((always_inline)) void tile(float *y, int y_width, const float *x, const number *w,
                                                       const number *bias, int n, int add, int rows, int outs)
{
    vec sums[ROWS][OUTS] = {0};
    for (int i = 0; i < n; i += LANES)
        for (int o = 0; o < outs; o++) {
            if (rows == 1)
                __builtin_prefetch(w + (OUTS + o) * n + i);  /* the next tile: with one row, memory is the limit */
            for (int r = 0; r < rows; r++)
                sums[r][o] += load(x + r * n + i) * get(w + o * n + i);
        }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++)
            y[r * y_width + o] = sum(sums[r][o]) + (bias ? get_one(bias + o) : 0) + (add ? y[r * y_width + o] : 0);
}

/* The same for any number of rows of x and up to OUTS rows of w. y has `width` columns. */
static void tiles(float *y, int width, const float *x, const number *w, const number *bias, int n, int add, int rows,
                  int outs)
{
    for (; rows >= ROWS && outs == OUTS; rows -= ROWS, x += ROWS * n, y += ROWS * width)
        tile(y, width, x, w, bias, n, add, ROWS, OUTS);
    for (; rows; rows--, x += n, y += width)
        if (outs == OUTS)
            tile(y, width, x, w, bias, n, add, 1, OUTS);
        else
            for (int o = 0; o < outs; o++)
                tile(y + o, width, x, w + o * n, bias ? bias + o : 0, n, add, 1, 1);
}

/* y = x weight^T + bias, or y += that if add. x: (N, in), y: (N, out). */
static void linear(float *y, const float *x, Layer layer, int N, int in, int out, int add)
{
    #pragma omp for schedule(static) nowait
    for (int o = 0; o < out; o += OUTS)
        tiles(y + o, out, x, layer.weight + (int64_t)o * in, layer.bias ? layer.bias + o : 0, in, add, N,
              out - o < OUTS ? out - o : OUTS);
}

/* y = LayerNorm(x), or RMSNorm(x) with the gain 1 + weight or weight. x, y: (N, C). */
static void norm(float *y, const float *x, Layer layer, const Trunk *t, int N)
{
    const int C = t->n_embd;
    #pragma omp for schedule(static)
    for (int n = 0; n < N; n++) {
        const float *from = x + n * C;
        float *to = y + n * C;
        vec mean = {0}, square = {0};
        if (t->norm == LAYERNORM) {
            for (int i = 0; i < C; i += LANES)
                mean += load(from + i);
            mean = (vec){0} + sum(mean) / C;
        }
        for (int i = 0; i < C; i += LANES)
            square += (load(from + i) - mean) * (load(from + i) - mean);
        const float scale = 1 / sqrtf(sum(square) / C + t->eps);
        for (int i = 0; i < C; i += LANES) {
            const vec gain = get(layer.weight + i) + (float)(t->norm == RMSNORM);
            const vec bias = layer.bias ? get(layer.bias + i) : (vec){0};
            store(to + i, (load(from + i) - mean) * scale * gain + bias);
        }
    }
}

/* Rotary positions, half-split: turns each pair (x[i], x[i + D/2]) by its angle. */
static void rotate(float *x, const float *cosine, const float *sine, int D)
{
    for (int i = 0; i < D / 2; i++) {
        const float first = x[i], second = x[i + D / 2];
        x[i] = first * cosine[i] - second * sine[i];
        x[i + D / 2] = second * cosine[i] + first * sine[i];
    }
}

/* y[d] = share * the sum over s of p[s] values[s][d], for `vecs` x LANES of the D channels d. */
static inline __attribute__((always_inline)) void weigh(float *y, const number *values, const float *p, float share,
                                                        int S, int D, int vecs)
{
    vec sums[MANY] = {0};
    for (int s = 0; s < S; s++)
        for (int i = 0; i < vecs; i++)
            sums[i] += p[s] * get(values + s * D + i * LANES);
    for (int i = 0; i < vecs; i++)
        store(y + i * LANES, sums[i] * share);
}

/* y = softmax(q k^T / sqrt(D)) v, for one head. q, y: (D), keys, values: (S, D), visible: (S) or NULL, p: a buffer of
   S, rounded up. */
static void attend(float *y, const float *q, const number *keys, const number *values, const uint8_t *visible,
                   float *p, int S, int D)
{
    const int end = (S + LANES - 1) / LANES * LANES;
    const float scale = 1 / sqrtf(D);
    float most = -INFINITY;
    for (int s = 0; s < S; s += OUTS)
        tiles(p + s, S, q, keys + s * D, 0, D, 0, 1, S - s < OUTS ? S - s : OUTS);
    for (int s = 0; visible && s < S; s++)
        p[s] = visible[s] ? p[s] : -INFINITY;
    for (int s = 0; s < S; s++)
        most = p[s] > most ? p[s] : most;
    for (int s = S; s < end; s++)
        p[s] = -INFINITY;
    vec total = {0};
    for (int s = 0; s < end; s += LANES) {
        const vec e = exponential((load(p + s) - most) * scale);
        store(p + s, e);
        total += e;
    }
    const float share = 1 / sum(total);
    int d = 0;
    for (; d + MANY * LANES <= D; d += MANY * LANES)
        weigh(y + d, values + d, p, share, S, D, MANY);
    for (; d < D; d += LANES)
        weigh(y + d, values + d, p, share, S, D, 1);
}

/* Stores the new keys and values in the caches from slot `start` on. Then each token attends to all slots up to its
   own, which gives t->y: (N, H D). ropes: see decode. */
static void attention(const Trunk *t, const Block *block, const float *cosine, const float *sine, int ropes, int B,
                      int T, int start)
{
    const int H = t->n_head, K = t->n_kv_head, D = t->head_dim;
    #pragma omp for schedule(static)
    for (int i = 0; i < B * T * K; i++) {
        const int n = i / K;
        const int64_t slot = ((int64_t)(n / T * K + i % K) * t->slots + start + n % T) * D;
        if (cosine)
            rotate(t->k + i * D, cosine + n % ropes * D, sine + n % ropes * D, D);
        for (int d = 0; d < D; d += LANES) {
            put(block->keys + slot + d, load(t->k + i * D + d));
            put(block->values + slot + d, load(t->v + i * D + d));
        }
    }
    #pragma omp for schedule(static)
    for (int i = 0; i < B * T * H; i++) {
        const int n = i / H;
        const int64_t first = (int64_t)(n / T * K + i % H / (H / K)) * t->slots * D;
        if (cosine)
            rotate(t->q + i * D, cosine + n % ropes * D, sine + n % ropes * D, D);
        attend(t->y + i * D, t->q + i * D, block->keys + first, block->values + first, 0,
               t->scores + (int64_t)i * t->n_scores, start + n % T + 1, D);
    }
}

/* Each token attends to the memory of its row, which gives t->y: (N, H D). */
static void cross_attention(const Trunk *t, const Block *block, int B, int T)
{
    const int H = t->n_head, K = t->n_kv_head, D = t->head_dim, S = t->n_memory;
    #pragma omp for schedule(static)
    for (int i = 0; i < B * T * H; i++) {
        const int row = i / H / T;
        const int64_t first = (int64_t)(row * K + i % H / (H / K)) * S * D;
        attend(t->y + i * D, t->q + i * D, block->memory_keys + first, block->memory_values + first,
               t->visible ? t->visible + row * S : 0, t->scores + (int64_t)i * t->n_scores, S, D);
    }
}

/* hidden = activation(hidden), or activation(gates) * hidden. */
static void activate(const Trunk *t, int N)
{
    #pragma omp for schedule(static)
    for (int i = 0; i < N * t->n_hidden; i += LANES) {
        vec up = load(t->hidden + i);
        if (t->mlp == GELU)
            up = gelu(up);
        else if (t->mlp == GEGLU)
            up *= gelu(load(t->gates + i));
        else if (t->mlp == SWIGLU)
            up *= silu(load(t->gates + i));
        else if (t->mlp == RELU2)
            up *= pick(up > 0, up, (vec){0});
        else
            up = pick(up > 0, up, (vec){0});
        store(t->hidden + i, up);
    }
}

/* What a sublayer reads: in pre-norm blocks t->y = norm(t->x), in post-norm blocks t->x itself. */
static const float *before(const Trunk *t, Layer layer, int N)
{
    if (!t->post_norm)
        norm(t->y, t->x, layer, t, N);
    return t->post_norm ? t->x : t->y;
}

/* After a sublayer was added to t->x: waits for all threads; in post-norm blocks t->x = norm(t->x). */
static void after(const Trunk *t, Layer layer, int N)
{
    #pragma omp barrier
    if (t->post_norm)
        norm(t->x, t->x, layer, t, N);
}

/* Computes the trunk's output from its input, both (B, T, C), for the positions from `start` on.
   cosine, sine: (ropes, D), where token n of N uses row n % ropes; NULL without rotary positions. */
void decode(const Trunk *t, number *output, const number *input, const float *cosine, const float *sine, int ropes,
            int B, int T, int start, int threads)
{
    const int N = B * T, C = t->n_embd, F = t->n_hidden, Q = t->n_head * t->head_dim, KV = t->n_kv_head * t->head_dim;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (int i = 0; i < N * C; i += LANES)
            store(t->x + i, get(input + i));
        for (int i = 0; i < t->n_layer; i++) {
            const Block *b = t->blocks + i;
            const float *from = before(t, b->ln_1, N);
            linear(t->q, from, b->q_proj, N, C, Q, 0);
            linear(t->k, from, b->k_proj, N, C, KV, 0);
            linear(t->v, from, b->v_proj, N, C, KV, 0);
            #pragma omp barrier
            attention(t, b, cosine, sine, ropes, B, T, start);
            linear(t->x, t->y, b->o_proj, N, Q, C, 1);
            after(t, b->ln_1, N);
            if (b->memory_keys) {
                linear(t->q, before(t, b->ln_x, N), b->cross_q_proj, N, C, Q, 0);
                #pragma omp barrier
                cross_attention(t, b, B, T);
                linear(t->x, t->y, b->cross_o_proj, N, Q, C, 1);
                after(t, b->ln_x, N);
            }
            from = before(t, b->ln_2, N);
            linear(t->hidden, from, b->up_proj, N, C, F, 0);
            if (b->gate_proj.weight)
                linear(t->gates, from, b->gate_proj, N, C, F, 0);
            #pragma omp barrier
            activate(t, N);
            linear(t->x, t->hidden, b->down_proj, N, F, C, 1);
            after(t, b->ln_2, N);
        }
        if (t->ln_f.weight)
            norm(t->x, t->x, t->ln_f, t, N);
        #pragma omp for schedule(static)
        for (int i = 0; i < N * C; i += LANES)
            put(output + i, load(t->x + i));
    }
}
