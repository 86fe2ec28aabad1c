// Attention over keys and values in bfloat16, on processors that multiply pairs of them: what `score` and `weighted_sum` of attention.h
// do, with queries and softmax weights rounded to bfloat16, too. Head sizes that are multiples of 32.
#pragma once
#ifdef __AVX512BF16__
#include "query.h"

constexpr int64_t CHUNK = 32;  // numbers in a register

inline __m512bh load_pairs(const void *from) { return (__m512bh)_mm512_loadu_si512(from); }

// Scores of N queries, q [N][D] in bfloat16, against positions first..end, four at a time (a few beyond the end are written).
template <int N>
void score_pairs(const Layer &layer, const Query *queries, const Half *const *q, const Half *const *rows, int64_t first,
                 int64_t end) {
    for (int64_t s = first; s < end; s += 4) {
        const Half *k[4];
        for (int j = 0; j < 4; j++) k[j] = rows[s + j < end ? s + j : end - 1], fetch(rows[s + j + AHEAD], layer.head_dim);
        __m512 sums[N][4] = {};
        for (int64_t i = 0; i < layer.head_dim; i += CHUNK)
            for (int j = 0; j < 4; j++) {
                __m512bh key = load_pairs(k[j] + i);
                for (int n = 0; n < N; n++) sums[n][j] = _mm512_dpbf16_ps(sums[n][j], load_pairs(q[n] + i), key);
            }
        for (int n = 0; n < N; n++) {
            Vec folded[4];
            for (int j = 0; j < 4; j++) folded[j] = lower(sums[n][j]) + upper(sums[n][j]);
            *(Quad *)(queries[n].scores + s - first) = hsum4(folded[0], folded[1], folded[2], folded[3]) * layer.scale;
        }
    }
}

// Results of N queries for numbers at..at + 32 C of the values, with weights [N][count rounded up to 2] in bfloat16: two positions
// at once, whose values are brought side by side.
template <int N, int C>
void weighted_sum_pairs(const Query *queries, const float *factors, const Pair *const *weights, const Half *const *rows, int64_t count,
               int64_t values, int64_t at) {
    __m512 sums[N][C][2] = {};
    for (int64_t s = 0; s < count; s += 2) {
        const Half *one = rows[s] + values + at, *two = rows[s + 1 < count ? s + 1 : s] + values + at;
        fetch(rows[s + AHEAD] + values + at, C * CHUNK), fetch(rows[s + AHEAD - 1] + values + at, C * CHUNK);
        for (int c = 0; c < C; c++) {
            __m512i a = _mm512_loadu_si512(one + c * CHUNK), b = _mm512_loadu_si512(two + c * CHUNK);
            __m512bh even = (__m512bh)_mm512_unpacklo_epi16(a, b), odd = (__m512bh)_mm512_unpackhi_epi16(a, b);
            for (int n = 0; n < N; n++) {
                __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[n][s / 2]);
                sums[n][c][0] = _mm512_dpbf16_ps(sums[n][c][0], weight, even);
                sums[n][c][1] = _mm512_dpbf16_ps(sums[n][c][1], weight, odd);
            }
        }
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++)
            for (int part = 0; part < 2; part++) {  // fours of numbers: 0, 2, 4, 6 of the chunk, then 1, 3, 5, 7
                float *to = queries[n].out + at + c * CHUNK + 4 * part;
                Vec low = lower(sums[n][c][part]) * factors[n], high = upper(sums[n][c][part]) * factors[n];
                store_half(to, low, 0), store_half(to + 8, low, 1), store_half(to + 16, high, 0), store_half(to + 24, high, 1);
            }
}

// `attend_queries` for N queries that see positions first..end.
template <int N>
void attend_queries_pairs(const Layer &layer, const Query *queries, const Half *const *rows, int64_t first, int64_t end) {
    int64_t D = layer.head_dim, count = end - first, at = 0, room = (count + LANES) / 2;
    static thread_local std::vector<Pair> memory;
    if ((int64_t)memory.size() < N * (D / 2 + room)) memory.resize(N * (D / 2 + room));
    const Half *q[N];
    const Pair *weights[N];
    float factors[N];
    for (int n = 0; n < N; n++) {
        Pair *to = memory.data() + n * (D / 2 + room);
        round_pairs(queries[n].q, D, to);
        q[n] = (const Half *)to, weights[n] = to + D / 2;
    }
    score_pairs<N>(layer, queries, q, rows, first, end);
    for (int n = 0; n < N; n++) {
        factors[n] = 1.f / softmax(layer, queries[n], first, end);
        round_pairs(queries[n].scores, (count + LANES - 1) / LANES * LANES, (Pair *)weights[n]);
    }
    for (; at + 2 * CHUNK <= D; at += 2 * CHUNK) weighted_sum_pairs<N, 2>(queries, factors, weights, rows + first, count, D, at);
    for (; at < D; at += CHUNK) weighted_sum_pairs<N, 1>(queries, factors, weights, rows + first, count, D, at);
}
#endif
