// Products of a few rows of input with a matrix in panels of 16 output rows. Sums are float32, each taken
// over the columns in order, whatever the number of rows of input. A matrix is kept as
//   FLOATS  float [rows / 16][cols][16]
//   HALVES  the same in bfloat16, rows 0, 8, 1, 9, ... of a panel as neighbours; a shift and a mask widen
//           them
//   TILES   see tiles.h
#pragma once
#include "tiles.h"
#include "types.h"
#include "vectors.h"

constexpr int64_t PANEL = 16;

// TILE tokens at most are multiplied with a panel at once, so that the registers hold their sums; few tokens
// take several panels together, PANELS at most and SUMS over their number, to keep enough sums in flight.
#ifdef __AVX512VL__  // 32 registers
constexpr int TILE = 8, SUMS = 8;
#else
constexpr int TILE = 6, SUMS = 4;
#endif
constexpr int PANELS = 4;

// Sums of T tokens and P panels that lie one after the other: [P][T][16].
template <int T, int P, typename W>
void multiply_tile(const W *panels, int64_t cols, const float *x, float *out) {
    Vec sums[T][P][2] = {};
    for (int64_t i = 0; i < cols; i++)
        for (int p = 0; p < P; p++) {
            const W *w = panels + (p * cols + i) * PANEL;
            __builtin_prefetch(w + P * cols * PANEL);  // the next panels, while this one is multiplied
            Vec low, high;
            load_rows(w, low, high);
            if (T > 1) keep(low), keep(high);
            for (int t = 0; t < T; t++) {
                Vec value = broadcast(x[t * cols + i]);
                sums[t][p][0] += value * low;
                sums[t][p][1] += value * high;
            }
        }
    for (int p = 0; p < P; p++)
        for (int t = 0; t < T; t++, out += PANEL)
            store(out, sums[t][p][0]), store(out + LANES, sums[t][p][1]);
}

// The tile of `tokens` (1 to T) and `panels` (1, 2, 4 ... P).
template <int T, int P, typename W>
void multiply_some(int64_t tokens, int64_t panels, const W *w, int64_t cols, const float *x, float *out) {
    if (panels < P) {
        if constexpr (P > 1)
            multiply_some<P == 2 ? TILE : SUMS * 2 / P, P / 2>(tokens, panels, w, cols, x, out);
    } else if (tokens < T) {
        if constexpr (T > 1) multiply_some<T - 1, P>(tokens, panels, w, cols, x, out);
    } else multiply_tile<T, P>(w, cols, x, out);
}

// The product of tokens with panels from..end, tile by tile: `emit(panel, token, low, high)` takes eight sums
// twice.
template <typename W, typename Emit>
void multiply_range(const W *panels, int64_t from, int64_t end, int64_t cols, const float *x, int64_t tokens,
                    const Emit &emit) {
    float sums[std::max(TILE, SUMS) * PANEL];
    for (int64_t p = from, together = PANELS; p < end; p += together) {
        while (together > 1 && (together * tokens > SUMS || p + together > end)) together /= 2;
        int64_t tiles = (tokens + TILE - 1) / TILE;
        for (int64_t k = 0, t = 0; k < tiles; k++) {
            int64_t count = tokens * (k + 1) / tiles - t;
            multiply_some<SUMS / PANELS, PANELS>(count, together, panels + p * cols * PANEL, cols,
                                                 x + t * cols, sums);
            for (int64_t q = 0, i = 0; q < together; q++)
                for (int64_t j = 0; j < count; j++, i += PANEL)
                    emit(p + q, t + j, load(sums + i), load(sums + i + LANES));
            t += count;
        }
    }
}

// This thread's share of the panels of x [tokens, cols] W^T.
template <typename Emit>
void multiply(const Matrix &m, const float *x, int64_t tokens, int64_t thread, int64_t threads,
              const Emit &emit) {
    int64_t panels = (m.rows + PANEL - 1) / PANEL, from = panels * thread / threads,
            end = panels * (thread + 1) / threads;
#ifdef __AMX_BF16__
    if (m.kind == TILES)
        return multiply_tile_range((const Half *)m.panels, from, end, m.cols, x, tokens, emit);
#endif
    if (m.kind == FLOATS) multiply_range((const float *)m.panels, from, end, m.cols, x, tokens, emit);
    else multiply_range((const Half *)m.panels, from, end, m.cols, x, tokens, emit);
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
