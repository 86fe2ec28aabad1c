// What a training step on a CPU does with small tensors, as one function where PyTorch needs dozens of
// operations: attention of drafted blocks (see attention.py) and the distillation losses of rows of logits
// (see draft/losses.py), each forward and backward. float32, plain C interface, compiled at first use (see
// native_training.py). Every sum is taken by one thread in one order, so that results do not depend on the
// number of threads.
#include <vector>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "vectors.h"

extern "C" {
struct Blocks {  // native_training.py has the same structures, field by field
    int64_t documents, gamma, own, heads, kv_heads, size, threads;
    float scale;
    const int64_t *first, *start,
        *stop;  // first block of each document and the number of blocks; what each block sees
    const float *q, *own_k, *own_v, *seen_k, *seen_v;
    float *out, *log_sum;  // [Q, N, D], [Q, N]
    const float *by_out;   // gradients; those of keys and values are added to
    float *by_q, *by_own_k, *by_own_v, *by_seen_k, *by_seen_v;
};
struct Distillation {
    int64_t rows, states, vocab, whole_vocab, threads;
    float *draft;                // logits [n, V]; the gradient by them when done
    const float *target;         // logits [u, V] of the draft vocabulary
    const float *whole;  // logits [u, whole_vocab] of the target's; null where the two vocabularies are one
    const int64_t *state,
        *token;  // [n]: each row's place in `target`, and the token that follows (-1: outside)
    float *draft_sum, *target_sum;  // log sum exp of each row [n], [u]
    float *mass;                  // [u]: the target's probability of the whole draft vocabulary
    float *ce, *tv, *kl, *inner;  // [n]: the losses, and sum_v q s with s = sign(q - p)
    const float *by_ce, *by_tv, *by_kl;  // [n]: weights of the losses in the whole
};
}

namespace {

typedef std::vector<const float *> Rows;

// scores[n][m] = a_n b_m for N rows of a and all of b; up to three numbers after the last are written, too.
template <int N>
void dot_rows(const float *const *a, const Rows &b, int64_t size, float *scores, int64_t stride) {
    int64_t count = b.size();
    for (int64_t m = 0; m < count; m += 4) {
        const float *k[4];
        for (int j = 0; j < 4; j++) k[j] = b[std::min<int64_t>(m + j, count - 1)];
        Vec sums[N][4] = {};
        for (int64_t i = 0; i < size; i += LANES)
            for (int n = 0; n < N; n++)
                for (int j = 0; j < 4; j++) sums[n][j] += load(a[n] + i) * load(k[j] + i);
        for (int n = 0; n < N; n++)
            *(Quad *)(scores + n * stride + m) = hsum4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    }
}
void dots(const Rows &a, const Rows &b, int64_t size, float *scores, int64_t stride) {
    size_t n = 0;
    for (; n + 2 <= a.size(); n += 2) dot_rows<2>(&a[n], b, size, scores + n * stride, stride);
    if (n < a.size()) dot_rows<1>(&a[n], b, size, scores + n * stride, stride);
}

// out_n += sum_m weights[n][m] b_m for N rows, C vectors at once.
template <int N, int C>
void mix_rows(float *const *out, const float *weights, int64_t stride, const Rows &b, int64_t at) {
    Vec sums[N][C] = {};
    for (size_t m = 0; m < b.size(); m++)
        for (int c = 0; c < C; c++) {
            Vec value = load(b[m] + at + c * LANES);
            for (int n = 0; n < N; n++) sums[n][c] += weights[n * stride + m] * value;
        }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) {
            float *to = out[n] + at + c * LANES;
            store(to, load(to) + sums[n][c]);
        }
}
template <int N>
void mix_wide(float *const *out, const float *weights, int64_t stride, const Rows &b, int64_t size) {
    int64_t at = 0;
    for (; at + 4 * LANES <= size; at += 4 * LANES) mix_rows<N, 4>(out, weights, stride, b, at);
    for (; at < size; at += LANES) mix_rows<N, 1>(out, weights, stride, b, at);
}
void weighted_sum(const std::vector<float *> &out, const float *weights, int64_t stride, const Rows &b,
                  int64_t size) {
    size_t n = 0;
    for (; n + 2 <= out.size(); n += 2) mix_wide<2>(&out[n], weights + n * stride, stride, b, size);
    if (n < out.size()) mix_wide<1>(&out[n], weights + n * stride, stride, b, size);
}

float log_sum_exp(const float *x, int64_t count, float scale) {
    float top = -INFINITY, rest = 0;
    int64_t whole = count / LANES * LANES;
    Vec tops = broadcast(top), sums = {};
    for (int64_t i = 0; i < whole; i += LANES) tops = load(x + i) > tops ? load(x + i) : tops;
    for (int64_t i = 0; i < LANES; i++) top = std::max(top, tops[i]);
    for (int64_t i = whole; i < count; i++) top = std::max(top, x[i]);
    for (int64_t i = 0; i < whole; i += LANES) sums += exponential((load(x + i) - top) * scale);
    for (int64_t i = whole; i < count; i++) rest += std::exp((x[i] - top) * scale);
    return top * scale + std::log(hsum(sums) + rest);
}

// One block and one key/value head: where its rows and keys are, and room for their scores.
struct Meeting {
    const Blocks &all;
    int64_t block, kv_head, fold = all.heads / all.kv_heads;

    int64_t row(int64_t query, int64_t f) const {
        return (block * all.gamma + query) * all.heads + kv_head * fold + f;
    }
    template <typename Pointer, typename List>
    void queries(Pointer base, List &rows) const {
        rows.clear();
        for (int64_t i = 0; i < all.gamma; i++)
            for (int64_t f = 0; f < fold; f++) rows.push_back(base + row(i, f) * all.size);
    }
    template <typename Pointer, typename List>
    void keys(Pointer seen, Pointer own, List &rows) const {
        rows.clear();
        for (int64_t c = all.start[block]; c < all.stop[block]; c++)
            rows.push_back(seen + (c * all.kv_heads + kv_head) * all.size);
        for (int64_t j = block * all.own; j < (block + 1) * all.own; j++)
            rows.push_back(own + (j * all.kv_heads + kv_head) * all.size);
    }
    float &log_sum(int64_t r) const { return all.log_sum[row(r / fold, r % fold)]; }
};

struct Room {
    Rows q, k, v, by_out, out;
    std::vector<float *> to, to_k, to_v;
    std::vector<float> scores, grads, scores_T, grads_T;
    float *sized(std::vector<float> &memory, int64_t count) {
        if ((int64_t)memory.size() < count) memory.resize(count);
        return memory.data();
    }
};

int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

void attend(const Meeting &at, Room &room) {
    const Blocks &all = at.all;
    at.queries(all.q, room.q), at.queries(all.out, room.to);
    at.keys(all.seen_k, all.own_k, room.k), at.keys(all.seen_v, all.own_v, room.v);
    int64_t rows = room.q.size(), keys = room.k.size(), stride = padded(keys);
    float *scores = room.sized(room.scores, rows * stride);
    dots(room.q, room.k, all.size, scores, stride);
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * stride, sum = log_sum_exp(row, keys, all.scale);
        at.log_sum(r) = sum;
        for (int64_t i = 0; i < stride; i += LANES)
            store(row + i, exponential(load(row + i) * all.scale - sum));
        std::memset(room.to[r], 0, all.size * sizeof(float));
    }
    weighted_sum(room.to, scores, stride, room.v, all.size);
}

void push_back(const Meeting &at, Room &room) {
    const Blocks &all = at.all;
    at.queries(all.q, room.q), at.queries(all.out, room.out), at.queries(all.by_out, room.by_out);
    at.queries(all.by_q, room.to);
    at.keys(all.seen_k, all.own_k, room.k), at.keys(all.seen_v, all.own_v, room.v);
    at.keys(all.by_seen_k, all.by_own_k, room.to_k), at.keys(all.by_seen_v, all.by_own_v, room.to_v);
    int64_t rows = room.q.size(), keys = room.k.size(), stride = padded(keys);
    float *probs = room.sized(room.scores, rows * stride), *grads = room.sized(room.grads, rows * stride);
    float *probs_T = room.sized(room.scores_T, rows * keys), *grads_T = room.sized(room.grads_T, rows * keys);
    dots(room.q, room.k, all.size, probs, stride);
    dots(room.by_out, room.v, all.size, grads, stride);
    for (int64_t r = 0; r < rows; r++) {
        Vec sums = {};
        for (int64_t i = 0; i < all.size; i += LANES)
            sums += load(room.by_out[r] + i) * load(room.out[r] + i);
        float inner = hsum(sums), sum = at.log_sum(r);
        for (int64_t i = r * stride; i < (r + 1) * stride; i += LANES) {
            Vec p = exponential(load(probs + i) * all.scale - sum);
            store(probs + i, p), store(grads + i, p * (load(grads + i) - inner) * all.scale);
        }
        for (int64_t i = 0; i < keys; i++)
            probs_T[i * rows + r] = probs[r * stride + i], grads_T[i * rows + r] = grads[r * stride + i];
        std::memset(room.to[r], 0, all.size * sizeof(float));
    }
    weighted_sum(room.to, grads, stride, room.k, all.size);
    weighted_sum(room.to_k, grads_T, rows, room.q, all.size);
    weighted_sum(room.to_v, probs_T, rows, room.by_out, all.size);
}

// Keys belong to one document and one head: no two threads add to the same gradient.
template <typename Work>
void each_meeting(const Blocks &all, const Work &work) {
#pragma omp parallel num_threads(all.threads)
    {
        Room room;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < all.documents * all.kv_heads; unit++) {
            int64_t document = unit / all.kv_heads;
            for (int64_t block = all.first[document]; block < all.first[document + 1]; block++)
                work(Meeting{all, block, unit % all.kv_heads}, room);
        }
    }
}

}  // namespace

extern "C" {

// In each thread of a team numbers too small for a normal float count as 0, or not; what was so in this one.
int flush_denormals(int64_t threads, int64_t on) {
#ifdef __SSE__
    constexpr unsigned BITS = 0x8040;  // flush to zero, denormals are zero
    unsigned before = _mm_getcsr();
#pragma omp parallel num_threads(threads)
    _mm_setcsr(on ? _mm_getcsr() | BITS : _mm_getcsr() & ~BITS);
    return (before & BITS) == BITS;
#else
    return 0;
#endif
}

void attend_blocks(const Blocks *all) { each_meeting(*all, attend); }

void push_back_blocks(const Blocks *all) { each_meeting(*all, push_back); }

void measure_rows(const Distillation *all) {
    int64_t V = all->vocab;
#pragma omp parallel num_threads(all->threads)
    {
#pragma omp for
        for (int64_t u = 0; u < all->states; u++) {
            float inside = all->target_sum[u] = log_sum_exp(all->target + u * V, V, 1);
            int64_t W = all->whole_vocab;
            all->mass[u] =
                all->whole ? std::min(1.f, std::exp(inside - log_sum_exp(all->whole + u * W, W, 1))) : 1;
        }
#pragma omp for
        for (int64_t n = 0; n < all->rows; n++) {
            const float *z = all->draft + n * V, *t = all->target + all->state[n] * V;
            float z_sum = log_sum_exp(z, V, 1), t_sum = all->target_sum[all->state[n]],
                  mass = all->mass[all->state[n]];
            Vec tv = {}, kl = {}, inner = {}, none = {};
            for (int64_t i = 0; i < V; i += LANES) {
                Vec log_q = load(z + i) - z_sum, log_p = load(t + i) - t_sum;
                Vec q = exponential(log_q), inside = exponential(log_p), p = inside * mass;
                tv += q > p ? q - p : p - q;
                kl += inside * (log_p - log_q);
                inner += (q > p ? q : none) - (q < p ? q : none);
            }
            all->draft_sum[n] = z_sum;
            all->ce[n] = all->token[n] < 0 ? INFINITY : z_sum - z[all->token[n]];
            all->tv[n] = hsum(tv) + (1 - mass), all->kl[n] = hsum(kl), all->inner[n] = hsum(inner);
        }
    }
}

void push_back_rows(const Distillation *all) {
    int64_t V = all->vocab;
#pragma omp parallel for num_threads(all->threads)
    for (int64_t n = 0; n < all->rows; n++) {
        float *z = all->draft + n * V, z_sum = all->draft_sum[n], t_sum = all->target_sum[all->state[n]];
        const float *t = all->target + all->state[n] * V;
        float mass = all->mass[all->state[n]], by_tv = all->by_tv[n], by_kl = all->by_kl[n],
              by_q = all->by_ce[n] + by_kl - by_tv * all->inner[n];
        Vec none = {};
        for (int64_t i = 0; i < V; i += LANES) {
            Vec q = exponential(load(z + i) - z_sum), inside = exponential(load(t + i) - t_sum),
                p = inside * mass;
            Vec turned = (q > p ? q : none) - (q < p ? q : none);
            store(z + i, turned * by_tv + q * by_q - inside * by_kl);
        }
        if (all->token[n] >= 0) z[all->token[n]] -= all->by_ce[n];
    }
}
}
