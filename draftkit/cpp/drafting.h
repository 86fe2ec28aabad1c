// A block drafter's way along its sequential head, for many requests side by side: from base logits and
// hidden states to tokens, drawn or greedy, their distributions and confidences.
#pragma once
#include <omp.h>

#include "matrix.h"
#include "sampling.h"

inline int64_t largest(const float *values, int64_t from, int64_t to) {  // the first one of equals
    int64_t whole = from + (to - from) / LANES * LANES;
    Vec tops = broadcast(-INFINITY);
    for (int64_t i = from; i < whole; i += LANES) {
        Vec x = load(values + i);
        tops = x > tops ? x : tops;
    }
    float top = hmax(tops);
    for (int64_t i = whole; i < to; i++) top = values[i] > top ? values[i] : top;
    for (int64_t i = from; i < to; i++)
        if (values[i] == top) return i;
    return from;  // no number at all
}

// One walk; its threads meet at barriers. `previous` are W1[x_(k-1)], `m` what W2 is multiplied with, both
// [R, r].
struct Walk {
    const SequentialHead &head;
    const Draft &draft;
    int64_t rank, thread, threads;
    float *previous, *m, *joined,
        *joint;  // the input of the joint matrix [R, its columns], and its output [R, its rows]
    int64_t *best;                         // [threads, R]

    float *logits(int64_t r, int64_t k) const { return draft.logits + (r * draft.positions + k) * draft.row; }
    const float *state(int64_t r, int64_t k) const {
        return draft.states + (r * draft.positions + k) * draft.hidden;
    }

    // The rows of the head and the confidence of position k.
    void look_back(int64_t k) const {
        for (int64_t r = thread; r < draft.requests; r += threads) {
            int64_t at = r * draft.positions + k, token = k ? draft.tokens[at - 1] : draft.anchors[r];
            float *w1 = previous + r * rank;
            if (rank) std::memcpy(w1, head.w1 + token * rank, rank * sizeof(float));
            if (head.kind == MARKOV) std::copy(w1, w1 + rank, m + r * rank);
            else join(r, k);
            if (!draft.confidence) continue;
            float sum = head.confidence_bias;
            const float *h = state(r, k);
            for (int64_t i = 0; i < draft.hidden; i++) sum += head.confidence[i] * h[i];
            for (int64_t i = draft.hidden; i < head.confidence_size; i++)
                sum += head.confidence[i] * w1[i - draft.hidden];
            draft.confidence[at] = 1.f / (1.f + std::exp(-sum));
        }
    }
    void join(int64_t r, int64_t k) const {
        float *to = joined + r * head.joint.cols, *memory = draft.memory + r * rank,
              *w1 = previous + r * rank;
        const float *h = state(r, k);
        if (head.kind == GATED) std::copy(w1, w1 + rank, std::copy(h, h + draft.hidden, to));
        else std::copy(h, h + draft.hidden, std::copy(w1, w1 + rank, std::copy(memory, memory + rank, to)));
    }
    void pass_joint() const {
        if (head.kind == MARKOV) return;
        multiply(head.joint, joined, draft.requests, thread, threads, Into{joint, head.joint.rows, nullptr});
#pragma omp barrier
        auto sigma = [](float x) { return 1.f / (1.f + std::exp(-x)); };
        const float *bias = head.joint_bias;
        for (int64_t r = thread; r < draft.requests; r += threads)
            for (int64_t i = 0; i < rank; i++) {
                const float *y = joint + r * head.joint.rows;
                if (head.kind == GATED) {
                    m[r * rank + i] = previous[r * rank + i] * sigma(y[i] + bias[i]);
                    continue;
                }
                float keep = sigma(y[i] + bias[i]), candidate = std::tanh(y[rank + i] + bias[rank + i]);
                float &memory = draft.memory[r * rank + i];
                memory = keep * memory + (1 - keep) * candidate;
                m[r * rank + i] = std::tanh(y[2 * rank + i] + bias[2 * rank + i]);
            }
#pragma omp barrier
    }
    void add_head(int64_t k) const {
        look_back(k);
#pragma omp barrier
        if (!rank) return;
        pass_joint();
        multiply(head.w2, m, draft.requests, thread, threads,
                 [&](int64_t panel, int64_t r, Vec low, Vec high) {
                     float *to = logits(r, k) + panel * PANEL;
                     store(to, load(to) + low);
                     if (panel * PANEL + LANES < head.w2.rows) store(to + LANES, load(to + LANES) + high);
                 });
#pragma omp barrier
    }

    void take_largest(int64_t k) const {
        int64_t R = draft.requests, panels = (draft.columns + PANEL - 1) / PANEL,
                from = panels * thread / threads * PANEL;
        int64_t to = std::min(panels * (thread + 1) / threads * PANEL, draft.columns);
        for (int64_t r = 0; r < R; r++) best[thread * R + r] = largest(logits(r, k), from, to);
#pragma omp barrier
        for (int64_t r = thread; r < R; r += threads) {
            int64_t top = best[r];
            for (int64_t other = 1; other < threads; other++)
                if (logits(r, k)[best[other * R + r]] > logits(r, k)[top]) top = best[other * R + r];
            keep(r, k, top);
        }
    }
    void draw_tokens(int64_t k) const {
        int64_t chunks = chunks_of(draft.columns);
        for (int64_t r = thread; r < draft.requests; r += threads) {
            int64_t at = r * draft.positions + k;
            double *sums = draft.sums + at * chunks;
            Softmax &soft = draft.softmaxes[at];
            describe(logits(r, k), draft.columns, draft.settings[r], soft, sums);
            int64_t column = draw(logits(r, k), draft.columns, soft, sums, draft.uniforms[at]);
            draft.chances[at] = chance(soft, logits(r, k), column);
            keep(r, k, column);
        }
    }
    void keep(int64_t r, int64_t k, int64_t column) const {
        int64_t at = r * draft.positions + k;
        draft.tokens[at] = draft.ids ? draft.ids[column] : column;
        if (!draft.largest) return;
        static thread_local std::vector<double> sums;
        sums.resize(chunks_of(draft.columns));
        Softmax plain;
        describe(logits(r, k), draft.columns, Setting{1, 1, 0, 0}, plain, sums.data());
        draft.largest[at] = (float)(1 / plain.total);
    }
};

extern "C" void draft_tokens(const SequentialHead *head, const Draft *draft) {
    int64_t R = draft->requests, rank = head->w1 ? head->w2.cols : 0;
    std::vector<int64_t> best(draft->threads * R);
    std::vector<float> previous(R * rank + PANEL), m(R * rank + PANEL);
    std::vector<float> joined(R * head->joint.cols + PANEL), joint(R * head->joint.rows + PANEL);
#pragma omp parallel num_threads(draft->threads)
    {
        Walk walk{*head, *draft, rank, omp_get_thread_num(), omp_get_num_threads(),
                  previous.data(), m.data(), joined.data(), joint.data(), best.data()};
        for (int64_t k = draft->from; k < draft->to; k++) {
            if (draft->part != TOKENS) walk.add_head(k);
            if (draft->part == LOGITS) continue;
            if (draft->settings) walk.draw_tokens(k);
            else walk.take_largest(k);
#pragma omp barrier
        }
    }
}
