// One pass of a transformer stack over flattened tokens and paged keys and values, as one function: what `Stack.run` does in
// a hundred PyTorch operations. Compiled at first use (see native.py); plain C interface, no padding, any number of tokens.
//
// The threads share one parallel region. Each keeps its own copy of the residual stream and of the normed input, so that a
// layer needs five barriers only: behind qkv, attention, out, gate/up and down. Every sum is taken in one order, so a token's
// result is the same to the bit alone, in any batch and with any number of threads.
// Matrices come as panels of 16 output rows, [rows / 16][cols][16], float32 or (half = 1) bfloat16 with rows 0, 8, 1, 9, ... of
// a panel as neighbours, so that a shift and a mask widen them; sums are float32.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(32)));
typedef uint32_t UintVec __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t LANES = 8, PANEL = 16, TILE = 6;  // TILE tokens x PANEL rows of sums fill the 16 registers of AVX2

extern "C" {
struct Matrix {
    const void *panels;
    int64_t rows, cols, half;
};
struct Layer {  // names as in stack.py; null (window, score_cap: 0) where a family has no such part
    int64_t heads, kv_heads, head_dim, window, value_norm;
    float scale, score_cap, output_scale;
    const float *input_norm, *qkv_bias, *qk_norm, *out_bias, *mixed_norm, *mlp_norm, *mlp_out_norm, *rotary;
    float *memory;  // [slots, M, 2 D]
    Matrix qkv, out, gate_up, down;
};
struct Stack {
    int64_t layers, hidden, gelu;
    float eps;
    const Layer *layer;
};
struct Ends {  // what lies before and behind the layers
    const float *embedding, *norm;
    float embedding_scale, logit_scale, logit_cap;
    Matrix head;
};
struct Step {
    int64_t tokens, requests, block_size, table_width, wanted, captures, threads;
    const int64_t *token, *position, *slot, *seen, *origin, *first, *length, *table, *want, *capture;
    float *features, *hidden, *logits;  // [T, captures H], [W, H], [W, V]
};
struct Context {  // a drafter's context features to keys and values of all its layers
    Matrix fc, kv;  // [H, F], [2 L M D, H]
    const float *norm, *k_norm;  // [H], [L, D]
};
}

namespace {

inline Vec load(const float *p) { return *(const Vec *)p; }
inline void load_rows(const float *p, Vec &low, Vec &high) { low = load(p), high = load(p + LANES); }
inline void load_rows(const uint16_t *p, Vec &low, Vec &high) {
    UintVec both = *(const UintVec *)p;
    low = (Vec)(both << 16), high = (Vec)(both & 0xffff0000u);
}
inline void store(float *p, Vec v) { *(Vec *)p = v; }
inline Vec spread(float x) { return Vec{x, x, x, x, x, x, x, x}; }
inline Quad halves(Vec v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
inline Quad totals(Vec a, Vec b, Vec c, Vec d) {  // the sum of each
    Quad p = halves(a), q = halves(b), r = halves(c), s = halves(d);
    Quad pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
    Quad rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) + __builtin_shufflevector(r, s, 2, 3, 6, 7);
    return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
}
inline float total(Vec v) {
    Quad h = halves(v);
    return (h[0] + h[2]) + (h[1] + h[3]);
}

// exp to 2 units in the last place for x <= 88; below -87 it gives 0 (nearly). Cody-Waite reduction, polynomial of Cephes.
inline Vec exponential(Vec x) {
    x = x > spread(-87.f) ? x : spread(-87.f);
    x = x < spread(88.f) ? x : spread(88.f);
    Vec scaled = x * 1.44269504088896341f + spread(12582912.f);  // round to nearest by adding 1.5 * 2^23
    IntVec n = (IntVec)scaled - (IntVec)spread(12582912.f);
    Vec k = scaled - spread(12582912.f);
    Vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * (Vec)((n + 127) << 23);
}
inline Vec sigmoid(Vec x) { return 1.f / (1.f + exponential(-x)); }
inline Vec activate(Vec gate, bool gelu) {  // silu, or gelu in its tanh form: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    return gate * sigmoid(gelu ? 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate) : gate);
}
inline float cap(float x, float limit) { return limit > 0 ? limit * std::tanh(x / limit) : x; }

void rms_norm(float *out, const float *x, const float *weight, int64_t size, float eps) {
    Vec squares = {};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    Vec factor = spread(1.f / std::sqrt(total(squares) / size + eps));
    for (int64_t i = 0; i < size; i += LANES) {
        Vec scaled = load(x + i) * factor;
        store(out + i, weight ? scaled * load(weight + i) : scaled);
    }
}

// Sums of T tokens and P panels that lie one behind the other; `emit(panel, token, low, high)` takes them.
template <int T, int P, typename W, typename Emit>
void multiply_tile(const W *panels, int64_t cols, const float *x, int64_t stride, const Emit &emit) {
    Vec sums[T][P][2] = {};
    for (int64_t i = 0; i < cols; i++)
        for (int p = 0; p < P; p++) {
            const W *w = panels + (p * cols + i) * PANEL;
            __builtin_prefetch(w + P * cols * PANEL);  // the next panels, while this one is multiplied
            Vec low, high;
            load_rows(w, low, high);
            for (int t = 0; t < T; t++) {
                Vec value = spread(x[t * stride + i]);
                sums[t][p][0] += value * low;
                sums[t][p][1] += value * high;
            }
        }
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++) emit(p, t, sums[t][p][0], sums[t][p][1]);
}

template <int P, typename W, typename Emit>
void multiply_panels(const W *w, int64_t cols, const float *x, int64_t stride, int64_t tokens, const Emit &emit) {
    int64_t tiles = (tokens + TILE - 1) / TILE;
    for (int64_t k = 0, t = 0; k < tiles; k++) {
        int64_t count = tokens * (k + 1) / tiles - t;
        auto shifted = [&](int p, int i, Vec low, Vec high) { emit(p, t + i, low, high); };
        const float *from = x + t * stride;
        if (count == 1) multiply_tile<1, P>(w, cols, from, stride, shifted);
        if constexpr (P <= 2) {
            if (count == 2) multiply_tile<2, P>(w, cols, from, stride, shifted);
            if (count == 3) multiply_tile<3, P>(w, cols, from, stride, shifted);
        }
        if constexpr (P == 1) {
            if (count == 4) multiply_tile<4, P>(w, cols, from, stride, shifted);
            if (count == 5) multiply_tile<5, P>(w, cols, from, stride, shifted);
            if (count == 6) multiply_tile<6, P>(w, cols, from, stride, shifted);
        }
        t += count;
    }
}

// This thread's share of the panels of x [tokens, cols] W^T. Few tokens take several panels at once, to keep enough sums in
// flight.
template <typename W, typename Emit>
void multiply_as(const Matrix &m, const float *x, int64_t tokens, int64_t thread, int64_t threads,
                 const Emit &emit) {
    int64_t panels = (m.rows + PANEL - 1) / PANEL, end = panels * (thread + 1) / threads;
    int64_t together = tokens == 1 ? 4 : tokens <= 3 ? 2 : 1;
    for (int64_t p = panels * thread / threads; p < end;) {
        const W *w = (const W *)m.panels + p * m.cols * PANEL;
        auto placed = [&](int q, int64_t t, Vec low, Vec high) { emit(p + q, t, low, high); };
        if (end - p < together) together = 1;
        if (together == 4) multiply_panels<4>(w, m.cols, x, m.cols, tokens, placed);
        else if (together == 2) multiply_panels<2>(w, m.cols, x, m.cols, tokens, placed);
        else multiply_panels<1>(w, m.cols, x, m.cols, tokens, placed);
        p += together;
    }
}
template <typename Emit>
void multiply(const Matrix &m, const float *x, int64_t tokens, int64_t thread, int64_t threads,
              const Emit &emit) {
    if (m.half) multiply_as<uint16_t>(m, x, tokens, thread, threads, emit);
    else multiply_as<float>(m, x, tokens, thread, threads, emit);
}

// Stores a panel's sums (+ bias) into y [tokens, rows].
struct Into {
    float *y;
    int64_t rows;
    const float *bias;
    void operator()(int64_t panel, int64_t t, Vec low, Vec high) const {
        float *out = y + t * rows + panel * PANEL;
        const float *b = bias ? bias + panel * PANEL : nullptr;
        store(out, b ? low + load(b) : low);
        if (panel * PANEL + LANES < rows) store(out + LANES, b ? high + load(b + LANES) : high);
    }
};

// Norm (when there is one) and rotation of one head in pair order; `table` is (cos, sin) pairs of the position.
void turn(float *x, const float *norm, const float *table, int64_t size, float eps) {
    if (norm) rms_norm(x, x, norm, size, eps);
    for (int64_t i = 0; i < size; i += 2) {
        float a = x[i], b = x[i + 1], c = table[i], s = table[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
    }
}

// Puts one head's new key (normed, rotated) and value into the memory.
void store_key_value(const Layer &layer, float *k, float *v, const float *k_norm, int64_t position, float *to, float eps) {
    int64_t D = layer.head_dim;
    turn(k, k_norm, layer.rotary + position * D, D, eps);
    std::memcpy(to, k, D * sizeof(float));
    if (layer.value_norm) rms_norm(to + D, v, nullptr, D, eps);
    else std::memcpy(to + D, v, D * sizeof(float));
}

// A query of one head: where it is, what it may see, where its result goes.
struct Query {
    const float *q;
    float *scores, *out;
    int64_t oldest, seen;
};

// Scores of N queries against positions first..end, four at a time (a few beyond the end are written, too).
template <int N>
void score(const Layer &layer, const Query *queries, const float *const *rows, int64_t first, int64_t end) {
    for (int64_t s = first; s < end; s += 4) {
        const float *k[4];
        for (int j = 0; j < 4; j++) k[j] = rows[s + j < end ? s + j : end - 1];
        Vec sums[N][4] = {};
        for (int64_t i = 0; i < layer.head_dim; i += LANES)
            for (int n = 0; n < N; n++)
                for (int j = 0; j < 4; j++) sums[n][j] += load(queries[n].q + i) * load(k[j] + i);
        for (int n = 0; n < N; n++)
            *(Quad *)(queries[n].scores + s - first) = totals(sums[n][0], sums[n][1], sums[n][2], sums[n][3]) * layer.scale;
    }
}

// Softmax in place over what the query may see, 0 elsewhere, not yet divided by the sum that it returns.
float soften(const Layer &layer, const Query &query, int64_t first, int64_t end) {
    float *scores = query.scores, top = -INFINITY;
    int64_t from = query.oldest - first, to = query.seen - first, count = end - first;
    for (int64_t i = 0; i < from; i++) scores[i] = -INFINITY;
    for (int64_t i = to; i < count || i % LANES; i++) scores[i] = -INFINITY;
    if (layer.score_cap > 0)
        for (int64_t i = from; i < to; i++) scores[i] = cap(scores[i], layer.score_cap);
    for (int64_t i = from; i < to; i++) top = scores[i] > top ? scores[i] : top;
    Vec sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        Vec x = load(scores + i) - top, e = x > spread(-87.f) ? exponential(x) : spread(0.f);
        store(scores + i, e);
        sums += e;
    }
    return total(sums);
}

// Results of N queries: values weighed with their scores, C vectors at once.
template <int N, int C>
void mix(const Query *queries, const float *factors, const float *const *rows, int64_t count, int64_t values, int64_t at) {
    Vec sums[N][C] = {};
    for (int64_t s = 0; s < count; s++)
        for (int c = 0; c < C; c++) {
            Vec value = load(rows[s] + values + at + c * LANES);
            for (int n = 0; n < N; n++) sums[n][c] += queries[n].scores[s] * value;
        }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) store(queries[n].out + at + c * LANES, sums[n][c] * factors[n]);
}

template <int N>
void answer(const Layer &layer, const Query *queries, const float *const *rows) {
    int64_t first = queries[0].oldest, end = queries[0].seen, D = layer.head_dim, at = 0;
    for (int n = 1; n < N; n++) first = std::min(first, queries[n].oldest), end = std::max(end, queries[n].seen);
    first -= first % LANES;  // sums are then grouped alike, whichever query is beside
    score<N>(layer, queries, rows, first, end);
    float factors[N];
    for (int n = 0; n < N; n++) factors[n] = 1.f / soften(layer, queries[n], first, end);
    for (; at + 4 * LANES <= D; at += 4 * LANES) mix<N, 4>(queries, factors, rows + first, end - first, D, at);
    for (; at < D; at += LANES) mix<N, 1>(queries, factors, rows + first, end - first, D, at);
}

// One request and one key/value head: rotate and store the new keys and values, then attend for every query, in pairs.
void attend(const Stack &stack, const Layer &layer, const Step &step, int64_t request, int64_t kv_head, float *qkv,
            float *mixed, float *scores, int64_t positions, const float **rows) {
    int64_t D = layer.head_dim, fold = layer.heads / layer.kv_heads, width = (layer.heads + 2 * layer.kv_heads) * D;
    int64_t row = layer.kv_heads * 2 * D, first = step.first[request], end = first + step.length[request], longest = 0;
    const int64_t *table = step.table + request * step.table_width;
    int64_t key_at = (layer.heads + kv_head) * D, value_at = key_at + layer.kv_heads * D;
    for (int64_t t = first; t < end; t++) {
        float *k = qkv + t * width + key_at, *v = qkv + t * width + value_at;
        store_key_value(layer, k, v, layer.qk_norm ? layer.qk_norm + key_at : nullptr, step.position[t],
                        layer.memory + step.slot[t] * row + kv_head * 2 * D, stack.eps);
        longest = std::max(longest, step.seen[t]);
    }
    for (int64_t block = 0; block * step.block_size < longest; block++)
        for (int64_t i = 0; i < step.block_size; i++)
            rows[block * step.block_size + i] =
                layer.memory + (table[block] * step.block_size + i) * row + kv_head * 2 * D;
    Query pair[2];
    int64_t waiting = 0;
    for (int64_t t = first; t < end; t++)
        for (int64_t h = kv_head * fold; h < (kv_head + 1) * fold; h++) {
            float *q = qkv + t * width + h * D;
            turn(q, layer.qk_norm ? layer.qk_norm + h * D : nullptr, layer.rotary + step.position[t] * D, D, stack.eps);
            int64_t oldest = layer.window ? std::max<int64_t>(0, step.origin[t] - layer.window) : 0;
            pair[waiting] = {q, scores + waiting * positions, mixed + (t * layer.heads + h) * D, oldest, step.seen[t]};
            if (++waiting == 2) answer<2>(layer, pair, rows), waiting = 0;
        }
    if (waiting) answer<1>(layer, pair, rows);
}

// Cuts pieces from one allocation that the calling thread keeps; the first round of `take` only counts.
struct Workspace {
    float *base = nullptr;
    int64_t used = 0;
    float *take(int64_t count) {
        float *piece = base ? base + used : nullptr;
        used += (count + PANEL - 1) / PANEL * PANEL;
        return piece;
    }
};
float *reserve(int64_t count) {
    static thread_local std::vector<float> memory;
    if ((int64_t)memory.size() < count) memory.resize(count);
    return memory.data();
}

struct Shared {
    float *qkv, *mixed, *y, *act;
};
struct Own {
    float *x, *normed, *scores;
    int64_t positions;  // room for scores of one query
    const float **rows;
};

// x = (x + y) * scale, with a norm of y first where the family has one; then normed = norm(x).
void add(const Stack &stack, const Step &step, const float *y, const float *y_norm, float scale, const float *next_norm,
         Own &own) {
    int64_t H = stack.hidden;
    for (int64_t t = 0; t < step.tokens; t++) {
        float *x = own.x + t * H, *normed = own.normed + t * H;
        const float *from = y + t * H;
        if (y_norm) rms_norm(normed, from, y_norm, H, stack.eps), from = normed;
        for (int64_t i = 0; i < H; i += LANES) store(x + i, (load(x + i) + load(from + i)) * scale);
        if (next_norm) rms_norm(normed, x, next_norm, H, stack.eps);
    }
}

void run_layers(const Stack &stack, const Step &step, const Shared &shared, Own &own, int64_t thread, int64_t threads) {
    int64_t T = step.tokens, H = stack.hidden;
    for (int64_t t = 0; t < T; t++) rms_norm(own.normed + t * H, own.x + t * H, stack.layer[0].input_norm, H, stack.eps);
    for (int64_t index = 0, captured = 0; index < stack.layers; index++) {
        const Layer &layer = stack.layer[index];
        multiply(layer.qkv, own.normed, T, thread, threads, Into{shared.qkv, layer.qkv.rows, layer.qkv_bias});
#pragma omp barrier
        for (int64_t unit = thread; unit < step.requests * layer.kv_heads; unit += threads)
            attend(stack, layer, step, unit / layer.kv_heads, unit % layer.kv_heads, shared.qkv, shared.mixed, own.scores,
                   own.positions, own.rows);
#pragma omp barrier
        multiply(layer.out, shared.mixed, T, thread, threads, Into{shared.y, H, layer.out_bias});
#pragma omp barrier
        add(stack, step, shared.y, layer.mixed_norm, 1.f, layer.mlp_norm, own);
        bool gelu = stack.gelu;
        float *act = shared.act;
        int64_t inner = layer.down.cols;
        multiply(layer.gate_up, own.normed, T, thread, threads, [=](int64_t panel, int64_t t, Vec gate, Vec up) {
            store(act + t * inner + panel * LANES, activate(gate, gelu) * up);  // a panel holds 8 rows of each
        });
#pragma omp barrier
        multiply(layer.down, shared.act, T, thread, threads, Into{shared.y, H, nullptr});
#pragma omp barrier
        bool last = index + 1 == stack.layers;
        add(stack, step, shared.y, layer.mlp_out_norm, layer.output_scale, last ? nullptr : stack.layer[index + 1].input_norm, own);
        if (captured < step.captures && step.capture[captured] == index) {
            if (thread == 0)
                for (int64_t t = 0; t < T; t++)
                    std::memcpy(step.features + (t * step.captures + captured) * H, own.x + t * H, H * sizeof(float));
            captured++;
        }
    }
}

}  // namespace

// Reads the step's tokens into the layers' memories; fills features, normed hidden states and logits of the wanted rows.
extern "C" void run_step(const Stack *stack, const Ends *ends, const Step *step) {
    int64_t T = step->tokens, H = stack->hidden, threads = step->threads;
    int64_t rows = T > step->wanted ? T : step->wanted, positions = step->table_width * step->block_size + PANEL;
    int64_t qkv = 0, mixed = 0, inner = 0;
    for (const Layer *layer = stack->layer; layer < stack->layer + stack->layers; layer++) {
        qkv = std::max(qkv, layer->qkv.rows), mixed = std::max(mixed, layer->out.cols);
        inner = std::max(inner, layer->down.cols);
    }
    Shared shared;
    std::vector<Own> owns(threads);
    for (Workspace space;; space.used = 0) {
        shared.qkv = space.take(T * qkv + PANEL);
        shared.mixed = space.take(T * mixed);
        shared.y = space.take(T * H + PANEL);
        shared.act = space.take(T * inner + PANEL);
        for (Own &own : owns) {
            own.x = space.take(T * H);
            own.normed = space.take(rows * H);
            own.scores = space.take(2 * positions);
            own.positions = positions;
            own.rows = (const float **)space.take(2 * positions);
        }
        if (space.base) break;
        space.base = reserve(space.used);
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        Own &own = owns[thread];
        for (int64_t t = 0; t < T; t++)
            for (int64_t i = 0; i < H; i += LANES)
                store(own.x + t * H + i, load(ends->embedding + step->token[t] * H + i) * ends->embedding_scale);
        run_layers(*stack, *step, shared, own, thread, count);
        for (int64_t w = 0; w < step->wanted; w++)
            rms_norm(own.normed + w * H, own.x + step->want[w] * H, ends->norm, H, stack->eps);
        if (thread == 0) std::memcpy(step->hidden, own.normed, step->wanted * H * sizeof(float));
        float scale = ends->logit_scale, limit = ends->logit_cap;
        Into into{step->logits, ends->head.rows, nullptr};
        multiply(ends->head, own.normed, step->wanted, thread, count, [=](int64_t p, int64_t t, Vec low, Vec high) {
            low *= scale, high *= scale;
            for (int i = 0; limit > 0 && i < LANES; i++) low[i] = cap(low[i], limit), high[i] = cap(high[i], limit);
            into(p, t, low, high);
        });
    }
}

// Projects context features [T, F] and writes the keys and values of every layer at the step's slots.
extern "C" void write_context(const Stack *stack, const Context *context, const Step *step, const float *features) {
    int64_t T = step->tokens, H = stack->hidden, L = stack->layers;
    int64_t M = stack->layer->kv_heads, D = stack->layer->head_dim;
    int64_t width = context->kv.rows;
    float *y, *kv;
    std::vector<Own> owns(step->threads);
    for (Workspace space;; space.used = 0) {
        y = space.take(T * H + PANEL);
        kv = space.take(T * width + PANEL);
        for (Own &own : owns) own.normed = space.take(T * H);
        if (space.base) break;
        space.base = reserve(space.used);
    }
#pragma omp parallel num_threads(step->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Own &own = owns[thread];
        multiply(context->fc, features, T, thread, threads, Into{y, H, nullptr});
#pragma omp barrier
        for (int64_t t = 0; t < T; t++) rms_norm(own.normed + t * H, y + t * H, context->norm, H, stack->eps);
        multiply(context->kv, own.normed, T, thread, threads, Into{kv, width, nullptr});
#pragma omp barrier
        for (int64_t unit = thread; unit < L * T; unit += threads) {
            int64_t l = unit / T, t = unit % T;
            const Layer &layer = stack->layer[l];
            for (int64_t m = 0; m < M; m++) {
                float *k = kv + t * width + (l * M + m) * D;
                store_key_value(layer, k, k + L * M * D, context->k_norm ? context->k_norm + l * D : nullptr,
                                step->position[t], layer.memory + (step->slot[t] * M + m) * 2 * D, stack->eps);
            }
        }
    }
}
