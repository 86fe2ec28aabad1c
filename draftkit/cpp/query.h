// A query's way through attention, as far as it is the same for all kinds of numbers in memory.
#pragma once
#include "matrix.h"

// A query of one head: where it is, what it may see, where its result goes.
struct Query {
    const float *q;
    float *scores, *out;
    int64_t oldest, seen;
};

// Keys and values of one head lie far apart from position to position, so that the processor does not guess the next ones.
// `rows` has room for AHEAD positions more than there are; whatever stands there, asking for it does no harm.
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
