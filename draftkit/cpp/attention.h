// Attention of one layer over paged keys and values; the memory of a layer is [slots, M, 2 D], of numbers K:
// float or Half.
#pragma once
#include "matrix.h"

// A step, its numbers, and for each token its position, where its key and value go, how many positions it
// sees and where windows reach back from; for each request its first token.
struct Placed : Step {
    const int64_t *token, *start, *length, *table, *want, *capture;
    int64_t *position, *slot, *seen, *origin, *first;

    explicit Placed(const Step &step) : Step(step) {
        token = numbers, start = token + tokens, length = start + requests, table = length + requests;
        want = table + requests * table_width, capture = want + wanted;
        static thread_local std::vector<int64_t> memory;
        memory.resize(4 * tokens + requests);
        position = memory.data(), slot = position + tokens, seen = slot + tokens, origin = seen + tokens,
        first = origin + tokens;
        for (int64_t r = 0, t = 0; r < requests; r++) {
            first[r] = t;
            for (int64_t i = start[r], end = start[r] + length[r]; i < end; i++, t++) {
                position[t] = i,
                slot[t] = table[r * table_width + i / block_size] * block_size + i % block_size;
                seen[t] = block ? end : i + 1, origin[t] = block ? start[r] : seen[t];
            }
        }
    }
};

// A query of one head: where it is, what it may see, where its result goes.
struct Query {
    const float *q;
    float *scores, *out;
    int64_t oldest, seen;
};

// Keys and values of one head lie far apart from position to position, so that the processor does not guess
// the next ones. `rows` has room for AHEAD positions more than there are; whatever stands there, asking for
// it does no harm.
constexpr int64_t AHEAD = 8;
template <typename K>
inline void fetch(const K *row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(K)) __builtin_prefetch(row + i);
}

// Softmax in place over what the query may see, 0 elsewhere, not yet divided by the sum that it returns.
float softmax(const Layer &layer, const Query &query, int64_t first, int64_t end) {
    float *scores = query.scores;
    int64_t from = query.oldest - first, to = query.seen - first, count = end - first;
    for (int64_t i = 0; i < from; i++) scores[i] = -INFINITY;
    for (int64_t i = to; i < count || i % LANES; i++) scores[i] = -INFINITY;
    if (layer.score_cap > 0)
        for (int64_t i = from; i < to; i++) scores[i] = cap(scores[i], layer.score_cap);
    Vec tops = broadcast(-INFINITY), sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        Vec x = load(scores + i);
        tops = x > tops ? x : tops;
    }
    float top = hmax(tops);
    for (int64_t i = 0; i < count; i += LANES) {
        Vec x = load(scores + i) - top, e = x > broadcast(-87.f) ? exponential(x) : broadcast(0.f);
        store(scores + i, e);
        sums += e;
    }
    return hsum(sums);
}

// Norm (when there is one) and rotation of one head in pair order; `table` is (cos, sin) pairs of the
// position.
void apply_rope(float *x, const float *norm, const float *table, int64_t size, float eps) {
    if (norm) rms_norm(x, x, norm, size, eps);
    constexpr Vec signs = {-1, 1, -1, 1, -1, 1, -1, 1};
    for (int64_t i = 0; i < size; i += LANES) {
        Vec pairs = load(x + i), both = load(table + i),
            turned = __builtin_shufflevector(pairs, pairs, 1, 0, 3, 2, 5, 4, 7, 6);
        Vec cosines = __builtin_shufflevector(both, both, 0, 0, 2, 2, 4, 4, 6, 6);
        Vec sines = __builtin_shufflevector(both, both, 1, 1, 3, 3, 5, 5, 7, 7);
        store(x + i, pairs * cosines + turned * (sines * signs));
    }
}

// Puts one head's new key (normed, rotated) and value into the memory.
template <typename K>
void store_key_value(const Layer &layer, float *k, float *v, const float *k_norm, int64_t position, K *to,
                     float eps) {
    int64_t D = layer.head_dim;
    apply_rope(k, k_norm, layer.rotary + position * D, D, eps);
    if (layer.value_norm) rms_norm(v, v, nullptr, D, eps);
    for (int64_t i = 0; i < D; i += LANES) store(to + i, load(k + i)), store(to + D + i, load(v + i));
}

// Scores of N queries against positions first..end, four at a time (a few beyond the end are written, too).
template <int N, typename K>
void score(const Layer &layer, const Query *queries, const K *const *rows, int64_t first, int64_t end) {
    for (int64_t s = first; s < end; s += 4) {
        const K *k[4];
        for (int j = 0; j < 4; j++) k[j] = rows[s + j < end ? s + j : end - 1];
        for (int j = 0; j < 4; j++) fetch(rows[s + j + AHEAD], layer.head_dim);
        Vec sums[N][4] = {};
        for (int64_t i = 0; i < layer.head_dim; i += LANES)
            for (int n = 0; n < N; n++)
                for (int j = 0; j < 4; j++) sums[n][j] += load(queries[n].q + i) * load(k[j] + i);
        for (int n = 0; n < N; n++)
            *(Quad *)(queries[n].scores + s - first) =
                hsum4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]) * layer.scale;
    }
}

// Results of N queries: values weighed with their scores, C vectors at once.
template <int N, int C, typename K>
void weighted_sum(const Query *queries, const float *factors, const K *const *rows, int64_t count,
                  int64_t values, int64_t at) {
    Vec sums[N][C] = {};
    for (int64_t s = 0; s < count; s++) {
        fetch(rows[s + AHEAD] + values + at, C * LANES);
        for (int c = 0; c < C; c++) {
            Vec value = load(rows[s] + values + at + c * LANES);
            for (int n = 0; n < N; n++) sums[n][c] += queries[n].scores[s] * value;
        }
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) store(queries[n].out + at + c * LANES, sums[n][c] * factors[n]);
}

template <int N, typename K>
void attend_queries(const Layer &layer, const Query *queries, const K *const *rows) {
    int64_t first = queries[0].oldest, end = queries[0].seen, D = layer.head_dim, at = 0;
    for (int n = 1; n < N; n++)
        first = std::min(first, queries[n].oldest), end = std::max(end, queries[n].seen);
    first -= first % LANES;  // sums are then grouped alike, whichever query is beside
    score<N>(layer, queries, rows, first, end);
    float factors[N];
    for (int n = 0; n < N; n++) factors[n] = 1.f / softmax(layer, queries[n], first, end);
    for (; at + 4 * LANES <= D; at += 4 * LANES)
        weighted_sum<N, 4>(queries, factors, rows + first, end - first, D, at);
    for (; at < D; at += LANES) weighted_sum<N, 1>(queries, factors, rows + first, end - first, D, at);
}

// Queries that share what is loaded of keys and values: their sums fill the registers, of which AVX-512
// has 32.
#ifdef __AVX512VL__
constexpr int TOGETHER = 4;
#else
constexpr int TOGETHER = 2;
#endif

template <int N, typename K>
void attend_some(int64_t count, const Layer &layer, const Query *queries, const K *const *rows) {
    if (count == N) attend_queries<N>(layer, queries, rows);
    else if constexpr (N > 1) attend_some<N - 1>(count, layer, queries, rows);
}

// One request and one key/value head: rotate and store the new keys and values, then attend for every query,
// a few at once.
template <typename K>
void attend(const Stack &stack, const Layer &layer, const Placed &step, int64_t request, int64_t kv_head,
            float *qkv, float *mixed, float *scores, int64_t positions, const K **rows) {
    K *memory = (K *)layer.memory;
    int64_t D = layer.head_dim, fold = layer.heads / layer.kv_heads,
            width = (layer.heads + 2 * layer.kv_heads) * D;
    int64_t row = layer.kv_heads * 2 * D, first = step.first[request], end = first + step.length[request],
            longest = 0;
    const int64_t *table = step.table + request * step.table_width;
    int64_t key_at = (layer.heads + kv_head) * D, value_at = key_at + layer.kv_heads * D;
    for (int64_t t = first; t < end; t++) {
        float *k = qkv + t * width + key_at, *v = qkv + t * width + value_at;
        store_key_value(layer, k, v, layer.qk_norm ? layer.qk_norm + key_at : nullptr, step.position[t],
                        memory + step.slot[t] * row + kv_head * 2 * D, stack.eps);
        longest = std::max(longest, step.seen[t]);
    }
    for (int64_t block = 0; block * step.block_size < longest; block++)
        for (int64_t i = 0; i < step.block_size; i++)
            rows[block * step.block_size + i] =
                memory + (table[block] * step.block_size + i) * row + kv_head * 2 * D;
    Query some[TOGETHER];
    int64_t waiting = 0;
    for (int64_t t = first; t < end; t++)
        for (int64_t h = kv_head * fold; h < (kv_head + 1) * fold; h++) {
            float *q = qkv + t * width + h * D;
            apply_rope(q, layer.qk_norm ? layer.qk_norm + h * D : nullptr,
                       layer.rotary + step.position[t] * D, D, stack.eps);
            int64_t oldest = layer.window ? std::max<int64_t>(0, step.origin[t] - layer.window) : 0;
            some[waiting] = {q, scores + waiting * positions, mixed + (t * layer.heads + h) * D, oldest,
                             step.seen[t]};
            if (++waiting == TOGETHER) attend_queries<TOGETHER>(layer, some, rows), waiting = 0;
        }
    attend_some<TOGETHER>(waiting, layer, some, rows);
}
