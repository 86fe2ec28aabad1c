// Products of a few rows of input with a matrix in panels of 16 output rows, [rows / 16][cols][16]: float32, or (half = 1)
// bfloat16 with rows 0, 8, 1, 9, ... of a panel as neighbours, so that a shift and a mask widen them. Sums are float32, each
// taken over the columns in order, whatever the number of rows of input.
#pragma once
#include "types.h"
#include "vectors.h"

constexpr int64_t PANEL = 16, TILE = 6;  // TILE tokens x PANEL rows of sums fill the 16 registers of AVX2

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
            if (T > 1) keep(low), keep(high);
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
        }
        if constexpr (P == 1) {
            if (count == 3) multiply_tile<3, P>(w, cols, from, stride, shifted);
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
    int64_t together = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
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
