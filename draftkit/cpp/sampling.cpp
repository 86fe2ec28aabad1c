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
struct Proposals {  // of so many requests, each with `places` drafted tokens, of which `lengths` are verified
    int64_t count, places;
    const Rows *p, *q;         // row first + k of p follows k drafted tokens, and is described when it is
                               // reached; row draft_first + k of q is what the k-th token was drawn from. q is
                               // null where tokens were taken for certain
    const Setting *settings;   // of the request's rows of p
    const int64_t *lengths, *first, *draft_first, *tokens;
    const double *chances;     // of the tokens under q
    const double *uniforms;    // [count, 2]: for the length, for the token after it
    int64_t *accepted, *next;  // what comes out
};
}

namespace {

constexpr int64_t WORTH_A_THREAD = 8192;  // logits

int64_t threads_for(int64_t rows, int64_t columns, int64_t threads) {
    return std::max((int64_t)1, std::min({threads, rows, rows * columns / WORTH_A_THREAD}));
}

// Chunks of max(0, p - q) of the k-th place of a request. A q over fewer tokens is laid out over all of them
// first.
class Residual {
  public:
    Residual(const Proposals &all, int64_t r, int64_t k)
        : all_(all), p_row_(all.first[r] + k), q_row_(all.q ? all.draft_first[r] + k : 0),
          token_(all.tokens[r * all.places + k]) {
        if (!all.q || !all.q->ids) return;
        static thread_local std::vector<float> whole;
        whole.assign(all.p->columns, 0.f);
        float weights[SPAN];
        for (int64_t from = 0; from < all.q->columns; from += SPAN) {
            int64_t to = std::min(from + SPAN, all.q->columns);
            weigh(all.q->softmaxes[q_row_], all.q->logits + q_row_ * all.q->stride, from, to, weights);
            for (int64_t j = from; j < to; j++) whole[all.q->ids[j]] = weights[j - from];
        }
        whole_ = whole.data();
    }

    float operator()(int64_t from, int64_t to, float *out) const {
        const Softmax &p = all_.p->softmaxes[p_row_];
        float buffer[SPAN], sum = 0, p_scale = (float)(1 / p.total);
        weigh(p, all_.p->logits + p_row_ * all_.p->stride, from, to, out);
        if (!all_.q) {
            for (int64_t j = from; j < to; j++) out[j - from] *= j == token_ ? 0.f : p_scale;
        } else {
            const Softmax &q = all_.q->softmaxes[q_row_];
            float q_scale = (float)(1 / q.total);
            const float *theirs = whole_ ? whole_ + from : buffer;
            if (!whole_) weigh(q, all_.q->logits + q_row_ * all_.q->stride, from, to, buffer);
            for (int64_t j = 0; j < to - from; j++)
                out[j] = std::max(0.f, out[j] * p_scale - theirs[j] * q_scale);
        }
        for (int64_t j = 0; j < to - from; j++) sum += out[j];
        return sum;
    }

  private:
    const Proposals &all_;
    int64_t p_row_, q_row_, token_;
    const float *whole_ = nullptr;
};

// A token of what is left of p after q; -1 where nothing is, which only rounding brings about.
int64_t draw_residual(const Residual &residual, int64_t vocab, double uniform) {
    static thread_local std::vector<double> sums;
    sums.resize(chunks_of(vocab));
    float weights[SPAN];
    double sum = 0;
    for (int64_t c = 0, from = 0; from < vocab; c++, from += SPAN)
        sum += sums[c] = residual(from, std::min(from + SPAN, vocab), weights);
    return sum > 0 ? draw(vocab, sums.data(), sum, uniform, residual) : -1;
}

// Token-wise rejection sampling: how many tokens of a request are accepted, and the one after them. More than
// k are with the product of the first k + 1 of min(1, p / q), so that no row after the end is looked at.
void verify_request(const Proposals &all, int64_t r) {
    const Rows &p = *all.p;
    int64_t chunks = chunks_of(p.columns), length = all.lengths[r], k = 0, row = all.first[r];
    const float *x = p.logits + row * p.stride;
    double *sums = p.sums + row * chunks, more = 1;
    for (;; k++, row++, x += p.stride, sums += chunks) {
        describe(x, p.columns, all.settings[r], p.softmaxes[row], sums);
        if (k == length) break;
        int64_t at = r * all.places + k;
        double q = all.q ? all.chances[at] : 1;
        more *= q > 0 ? std::min(1., chance(p.softmaxes[row], x, all.tokens[at]) / q) : 0;
        if (1 - more > all.uniforms[2 * r]) break;
    }
    all.accepted[r] = k;
    double uniform = all.uniforms[2 * r + 1];
    int64_t token = k < length ? draw_residual(Residual(all, r, k), p.columns, uniform) : -1;
    all.next[r] = token >= 0 ? token : draw(x, p.columns, p.softmaxes[row], sums, uniform);
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

// See `verify_request`.
extern "C" void verify_tokens(const Proposals *all) {
    int64_t threads = threads_for(all->count, all->p->columns, all->p->threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t r = 0; r < all->count; r++) verify_request(*all, r);
}
