// Sampling from rows of logits and verifying proposals, over rows side by side: see sampling.h for what is
// done with each.
#include <omp.h>

#include "sampling.h"

extern "C" {
struct Rows {  // logits, `stride` from one row to the next; softmaxes and sums of chunks [count, chunks],
               // made by `describe_rows`
    int64_t count, columns, stride, threads;
    const float *logits;
    Softmax *softmaxes;
    double *sums;
    const int64_t *ids;  // the token of each column; null where they are the same
};
struct Residuals {  // max(0, weight p - q) of pairs of rows; q_row -1 is p itself
    int64_t count, vocab;
    const Rows *p, *q;
    const int64_t *p_row, *q_row;
    const double *weight;
};
}

namespace {

constexpr int64_t WORTH_A_THREAD = 8192;  // logits

int64_t threads_for(int64_t rows, int64_t columns, int64_t threads) {
    return std::max((int64_t)1, std::min({threads, rows, rows * columns / WORTH_A_THREAD}));
}

// Chunks of residual weights of one pair. A q over fewer tokens is laid out over all of them first.
class Residual {
  public:
    Residual(const Residuals &pairs, int64_t i)
        : p_(pairs.p->softmaxes[pairs.p_row[i]]), q_(pairs.q->softmaxes[pairs.q_row[i]]),
          p_logits_(pairs.p->logits + pairs.p_row[i] * pairs.p->stride),
          q_logits_(pairs.q->logits + pairs.q_row[i] * pairs.q->stride),
          p_scale_((float)(pairs.weight[i] / p_.total)), q_scale_((float)(1 / q_.total)),
          spread_out_(pairs.q->ids != nullptr) {
        if (!spread_out_) return;
        static thread_local std::vector<float> whole;
        whole.assign(pairs.vocab, 0.f);
        float weights[SPAN];
        for (int64_t from = 0; from < pairs.q->columns; from += SPAN) {
            int64_t to = std::min(from + SPAN, pairs.q->columns);
            weigh(q_, q_logits_, from, to, weights);
            for (int64_t j = from; j < to; j++) whole[pairs.q->ids[j]] = weights[j - from];
        }
        whole_ = whole.data();
    }

    float operator()(int64_t from, int64_t to, float *out) const {
        float buffer[SPAN], sum = 0;
        const float *q = buffer;
        weigh(p_, p_logits_, from, to, out);
        if (spread_out_) q = whole_ + from;
        else weigh(q_, q_logits_, from, to, buffer);
        for (int64_t j = 0; j < to - from; j++) out[j] = std::max(0.f, out[j] * p_scale_ - q[j] * q_scale_);
        for (int64_t j = 0; j < to - from; j++) sum += out[j];
        return sum;
    }

  private:
    const Softmax &p_, &q_;
    const float *p_logits_, *q_logits_;
    float p_scale_, q_scale_;
    bool spread_out_;
    const float *whole_ = nullptr;
};

// Sums of the chunks, and of all.
double add_up(const Residual &residual, int64_t vocab, double *sums) {
    float weights[SPAN];
    double sum = 0;
    for (int64_t c = 0, from = 0; from < vocab; c++, from += SPAN)
        sum += sums[c] = residual(from, std::min(from + SPAN, vocab), weights);
    return sum;
}

}  // namespace

extern "C" void describe_rows(const Rows *rows, const Setting *settings) {
    int64_t chunks = chunks_of(rows->columns),
            threads = threads_for(rows->count, rows->columns, rows->threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < rows->count; i++)
        describe(rows->logits + i * rows->stride, rows->columns, settings[i], rows->softmaxes[i],
                 rows->sums + i * chunks);
}

// One token of each row, and its probability where `chances` is not null.
extern "C" void draw_rows(const Rows *rows, const double *uniforms, int64_t *tokens, double *chances) {
    int64_t chunks = chunks_of(rows->columns);
    for (int64_t i = 0; i < rows->count; i++) {
        const float *x = rows->logits + i * rows->stride;
        int64_t column = draw(x, rows->columns, rows->softmaxes[i], rows->sums + i * chunks, uniforms[i]);
        tokens[i] = rows->ids ? rows->ids[column] : column;
        if (chances) chances[i] = chance(rows->softmaxes[i], x, column);
    }
}

// The probability of a column in some rows.
extern "C" void find_chances(const Rows *rows, int64_t count, const int64_t *row, const int64_t *column,
                             double *out) {
    for (int64_t i = 0; i < count; i++)
        out[i] = chance(rows->softmaxes[row[i]], rows->logits + row[i] * rows->stride, column[i]);
}

// All probabilities, [count, vocab].
extern "C" void fill_rows(const Rows *rows, int64_t vocab, float *out) {
    int64_t threads = threads_for(rows->count, rows->columns, rows->threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < rows->count; i++) {
        const Softmax &soft = rows->softmaxes[i];
        float factor = (float)(1 / soft.total), weights[SPAN], *to = out + i * vocab;
        if (rows->ids) std::fill(to, to + vocab, 0.f);
        for (int64_t from = 0; from < rows->columns; from += SPAN) {
            int64_t end = std::min(from + SPAN, rows->columns);
            weigh(soft, rows->logits + i * rows->stride, from, end, weights);
            for (int64_t j = from; j < end; j++)
                to[rows->ids ? rows->ids[j] : j] = weights[j - from] * factor;
        }
    }
}

// The sum of each residual.
extern "C" void sum_residuals(const Residuals *pairs, double *out) {
    int64_t threads = threads_for(pairs->count, pairs->vocab, pairs->p->threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < pairs->count; i++) {
        std::vector<double> sums(chunks_of(pairs->vocab));
        out[i] = add_up(Residual(*pairs, i), pairs->vocab, sums.data());
    }
}

// One token of each residual; of p where nothing is left of it, which only rounding brings about.
extern "C" void draw_residuals(const Residuals *pairs, const double *uniforms, int64_t *tokens) {
    int64_t threads = threads_for(pairs->count, pairs->vocab, pairs->p->threads),
            chunks = chunks_of(pairs->vocab);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < pairs->count; i++) {
        const Rows &p = *pairs->p;
        int64_t row = pairs->p_row[i];
        if (pairs->q_row[i] >= 0) {
            Residual residual(*pairs, i);
            std::vector<double> sums(chunks);
            double sum = add_up(residual, pairs->vocab, sums.data());
            if (sum > 0) {
                tokens[i] = draw(pairs->vocab, sums.data(), sum, uniforms[i], residual);
                continue;
            }
        }
        tokens[i] =
            draw(p.logits + row * p.stride, p.columns, p.softmaxes[row], p.sums + row * chunks, uniforms[i]);
    }
}
