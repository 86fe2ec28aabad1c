// The distribution that a row of logits is sampled from, described by a few numbers (`Softmax`) instead of made: temperature, then
// top-k, top-p and min-p, each on what the one before left. All three keep the largest logits, so that together they are one
// cut; of logits equal to the cut, top-p may keep only the first ones. What follows the description looks at single tokens or
// takes one pass over the row. All is float32 with sums over chunks in float64, in an order that depends on the row alone.
//
// A logit that is no number counts as -infinity. A row whose largest logit is not finite, like one at temperature 0, has all its
// mass on the first largest one.
#pragma once
#include <cfloat>
#include <functional>
#include <vector>

#include "vectors.h"

constexpr int64_t SPAN = 256;  // logits of a chunk
constexpr float LEAST_EXPONENT = -87.f;  // below it a weight is 0

extern "C" {
struct Setting {  // of a row; top_k 0, top_p 1 and min_p 0 are off
    double temperature, top_p, min_p;
    int64_t top_k;
};
struct Softmax {
    double total;           // the sum of all weights
    int64_t best, last;     // the first largest logit; of those equal to the cut the ones up to `last` are kept
    float top, slope, cut;  // the largest logit; a weight is exp((x - top) slope), and 0 for x below the cut
    int32_t single;         // all mass is on `best`
};
}

inline int64_t chunks_of(int64_t count) { return (count + SPAN - 1) / SPAN; }

inline Vec weight(const Softmax &soft, Vec x) {
    Vec exponent = (x - soft.top) * soft.slope;
    Vec e = exponent > broadcast(LEAST_EXPONENT) ? exponential(exponent) : broadcast(0.f);
    return x >= broadcast(soft.cut) ? e : broadcast(0.f);
}

// The weights of logits from..to, 0 where they are cut, and their sum.
inline float weigh(const Softmax &soft, const float *x, int64_t from, int64_t to, float *weights) {
    if (soft.single) {
        std::fill(weights, weights + (to - from), 0.f);
        bool here = from <= soft.best && soft.best < to;
        if (here) weights[soft.best - from] = 1.f;
        return here;
    }
    Vec sums = {};
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) {
        Vec e = weight(soft, load(x + i));
        store(weights + i - from, e);
        sums += e;
    }
    float sum = hsum(sums);
    for (; i < to; i++) sum += weights[i - from] = weight(soft, broadcast(x[i]))[0];
    if (soft.last + 1 < to) {
        for (int64_t j = std::max(from, soft.last + 1); j < to; j++)
            if (x[j] == soft.cut) weights[j - from] = 0.f;
        sum = 0.f;
        for (int64_t j = 0; j < to - from; j++) sum += weights[j];
    }
    return sum;
}

// The probability of one token.
inline double chance(const Softmax &soft, const float *x, int64_t at) {
    if (soft.single) return at == soft.best;
    if (x[at] == soft.cut && at > soft.last) return 0;
    return weight(soft, broadcast(x[at]))[0] / soft.total;
}

// The largest logit of each chunk, and of all.
inline float maxima(const float *x, int64_t count, float *tops) {
    float all = -INFINITY;
    for (int64_t c = 0, i = 0; i < count; c++) {
        int64_t end = std::min(i + SPAN, count);
        Vec a = broadcast(-INFINITY), b = a;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            Vec u = load(x + i), v = load(x + i + LANES);
            a = u > a ? u : a, b = v > b ? v : b;
        }
        float top = hmax(a > b ? a : b);
        for (; i < end; i++) top = x[i] > top ? x[i] : top;
        tops[c] = top;
        all = top > all ? top : all;
    }
    return all;
}

// What a thread needs while it works on a row.
struct Room {
    std::vector<float> tops, values, weights;
};
inline Room &room_for(int64_t count) {
    static thread_local Room room;
    if ((int64_t)room.values.size() < count + SPAN) {
        room.tops.resize(chunks_of(count)), room.values.resize(count + SPAN), room.weights.resize(count + SPAN);
    }
    return room;
}

// Logits of at least `least` to `values`, with a softmax also their weights; how many.
inline int64_t collect(const float *x, int64_t count, float least, const Softmax *soft, Room &room) {
    int64_t found = 0;
    float weights[SPAN] = {};
    for (int64_t c = 0, from = 0; from < count; c++, from += SPAN) {
        if (!(room.tops[c] >= least)) continue;
        int64_t to = std::min(from + SPAN, count);
        if (soft) weigh(*soft, x, from, to, weights);
        for (int64_t i = from; i < to; i++) {  // without a branch that nobody can guess
            room.values[found] = x[i];
            room.weights[found] = weights[i - from];
            found += x[i] >= least;
        }
    }
    return found;
}

// The k-th largest logit, -FLT_MAX where fewer are finite.
inline float largest_but(int64_t k, const float *x, int64_t count, Room &room) {
    float bound = -FLT_MAX;
    auto kth = [&](int64_t found) {
        std::nth_element(room.values.begin(), room.values.begin() + k - 1, room.values.begin() + found, std::greater<float>());
        return room.values[k - 1];
    };
    int64_t chunks = chunks_of(count);
    if (k <= chunks) {  // so many chunks have a logit of at least the k-th largest of their maxima
        std::copy(room.tops.begin(), room.tops.begin() + chunks, room.values.begin());
        bound = std::max(bound, kth(chunks));
    }
    int64_t found = collect(x, count, bound, nullptr, room);
    return found < k ? -FLT_MAX : kth(found);
}

// Whole numbers in the order of floats.
inline int64_t key_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
inline float of_key(int64_t key) {
    int32_t bits = (int32_t)key;
    bits ^= bits >> 31 & 0x7fffffff;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The largest number t such that the weights of values >= t sum to `wanted` at least (`least`, if none does), and the sum of
// those above t. The interval is cut into eight at a time, and what lies outside is dropped.
inline float cut_at(int64_t count, double wanted, float least, float top, Room &room, double &above) {
    constexpr int CUTS = 7;
    float *x = room.values.data(), *w = room.weights.data();
    int64_t low = key_of(least), high = key_of(top) + 1;
    above = 0;
    while (high - low > 1) {
        std::fill(x + count, x + count + LANES, -INFINITY), std::fill(w + count, w + count + LANES, 0.f);
        int64_t keys[CUTS];
        Vec cuts[CUTS], sums[CUTS] = {};
        for (int j = 0; j < CUTS; j++) keys[j] = low + (high - low) * (j + 1) / (CUTS + 1), cuts[j] = broadcast(of_key(keys[j]));
        for (int64_t i = 0; i < count; i += LANES) {
            Vec v = load(x + i), m = load(w + i);
            for (int j = 0; j < CUTS; j++) sums[j] += v >= cuts[j] ? m : broadcast(0.f);
        }
        double base = above;
        bool open = true;  // nothing is above the interval yet
        for (int j = 0; j < CUTS; j++) {
            double sum = base + hsum(sums[j]);
            if (sum < wanted) {
                high = keys[j], above = sum, open = false;
                break;
            }
            low = keys[j];
        }
        float first = of_key(low), end = open ? INFINITY : of_key(high);
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) {
            float value = x[i], weight = w[i];
            x[kept] = value, w[kept] = weight;
            kept += value >= first && value < end;
        }
        count = kept;
    }
    return of_key(low);
}

// Cut to the fewest most likely tokens whose share is `top_p` at least; of equally likely ones the first.
inline void keep_nucleus(double top_p, const float *x, int64_t count, Softmax &soft, Room &room) {
    double sum = 0, above;
    float weights[SPAN];
    for (int64_t c = 0, from = 0; from < count; c++, from += SPAN)
        if (room.tops[c] >= soft.cut) sum += weigh(soft, x, from, std::min(from + SPAN, count), weights);
    double wanted = std::max(top_p, (double)FLT_MIN) * sum;  // the most likely token stays
    // tokens of less than `least` weigh less than what may be left out, all together
    double least = .5 * (1 - top_p) * sum / count;
    float lowest = std::max(soft.cut, (float)(soft.top + std::log(std::max(least, DBL_MIN)) / soft.slope));
    soft.cut = cut_at(collect(x, count, lowest, &soft, room), wanted, lowest, soft.top, room, above);
    double each = weight(soft, broadcast(soft.cut))[0], equals = each > 0 ? std::ceil((wanted - above) / each) : count;
    int64_t left = std::max((int64_t)1, (int64_t)std::min(equals, (double)count)), last = count - 1;
    for (int64_t c = 0, from = 0; from < count; c++, from += SPAN) {
        if (!(room.tops[c] >= soft.cut)) continue;
        for (int64_t i = from; i < std::min(from + SPAN, count); i++) {
            if (x[i] != soft.cut) continue;
            if (left-- == 0) {
                soft.last = last;
                return;
            }
            last = i;
        }
    }
}

// Describe a row; `sums` [chunks] get the weights' sums.
inline void describe(const float *x, int64_t count, const Setting &setting, Softmax &soft, double *sums) {
    Room &room = room_for(count);
    soft.top = maxima(x, count, room.tops.data());
    soft.best = 0, soft.last = count - 1, soft.cut = -FLT_MAX, soft.total = 1;
    while (soft.best < count && x[soft.best] != soft.top) {
        bool elsewhere = soft.best % SPAN == 0 && room.tops[soft.best / SPAN] != soft.top;
        soft.best += elsewhere ? SPAN : 1;
    }
    if (soft.best >= count) soft.best = 0;  // no number at all
    soft.slope = (float)std::min(1 / setting.temperature, (double)FLT_MAX);
    soft.single = !(setting.temperature > 0) || !std::isfinite(soft.top);
    if (!soft.single) {
        if (setting.top_k > 0 && setting.top_k < count) soft.cut = largest_but(setting.top_k, x, count, room);
        if (setting.top_p < 1) keep_nucleus(setting.top_p, x, count, soft, room);
        float least = setting.min_p > 0 ? std::min(soft.top, (float)(soft.top + std::log(setting.min_p) / soft.slope)) : -FLT_MAX;
        if (least > soft.cut) soft.cut = least, soft.last = count - 1;
    }
    float weights[SPAN];
    double sum = 0;
    for (int64_t c = 0, from = 0; from < count; c++, from += SPAN) {
        bool some = soft.single || room.tops[c] >= soft.cut;
        sum += sums[c] = some ? weigh(soft, x, from, std::min(from + SPAN, count), weights) : 0.f;
    }
    soft.total = sum;
}

// The first token at which the running sum of weights exceeds `uniform` times the total: `weigh_chunk(from, to, weights)` gives
// those of a chunk, `sums` are its sums. A token without weight never comes.
template <typename WeighChunk>
int64_t draw(int64_t count, const double *sums, double total, double uniform, const WeighChunk &weigh_chunk) {
    double wanted = uniform * total, before = 0;
    int64_t chosen = 0;
    for (int64_t c = 0; c < chunks_of(count); c++) {
        if (!(sums[c] > 0)) continue;
        chosen = c;
        if (before + sums[c] > wanted) break;
        before += sums[c];
    }
    float weights[SPAN];
    int64_t from = chosen * SPAN, to = std::min(from + SPAN, count), last = from;
    weigh_chunk(from, to, weights);
    for (int64_t i = from; i < to; i++) {
        if (!(weights[i - from] > 0)) continue;
        last = i, before += weights[i - from];
        if (before > wanted) break;
    }
    return last;
}
inline int64_t draw(const float *x, int64_t count, const Softmax &soft, const double *sums, double uniform) {
    if (soft.single) return soft.best;
    return draw(count, sums, soft.total, uniform, [&](int64_t from, int64_t to, float *to_weights) {
        weigh(soft, x, from, to, to_weights);
    });
}
