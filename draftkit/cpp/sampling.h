// The distribution that a row of logits is sampled from, described by a few numbers (`Softmax`) instead of
// made: temperature, then top-k, top-p and min-p, each on what the one before left. All three keep the
// largest logits, so that together they are one cut; of logits equal to the cut, top-p may keep only the
// first ones. What follows the description looks at single tokens or takes one pass over the row. All is
// float32 with sums over chunks in float64, in an order that depends on the row alone.
//
// A logit that is no number counts as -infinity. A row whose largest logit is not finite, like one at
// temperature 0, has all its mass on the first largest one.
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
    int64_t best, last;  // the first largest logit; of those equal to the cut the ones up to `last` are kept
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

// What a thread needs while it works on a row: the largest logit of each chunk and of its lanes; some logits.
struct Room {
    std::vector<float> tops, lanes, values;
};
inline Room &room_for(int64_t count) {
    static thread_local Room room;
    int64_t chunks = chunks_of(count);
    if ((int64_t)room.tops.size() < chunks)
        room.tops.resize(chunks), room.lanes.resize(chunks * LANES), room.values.resize(chunks * SPAN);
    return room;
}

// The largest logit of each chunk and of every eighth logit of it; of all.
inline float maxima(const float *x, int64_t count, Room &room) {
    float all = -INFINITY;
    for (int64_t c = 0, i = 0; i < count; c++) {
        int64_t end = std::min(i + SPAN, count);
        Vec a = broadcast(-INFINITY), b = a;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            Vec u = load(x + i), v = load(x + i + LANES);
            a = u > a ? u : a, b = v > b ? v : b;
        }
        Vec tops = a > b ? a : b;
        for (; i < end; i++)
            if (x[i] > tops[i % LANES]) tops[i % LANES] = x[i];
        store(room.lanes.data() + c * LANES, tops);
        float top = room.tops[c] = hmax(tops);
        all = top > all ? top : all;
    }
    return all;
}

// The k-th largest logit, -FLT_MAX where fewer are finite. Every lane has a logit of its own as large as its
// maximum, so that no logit below the k-th largest maximum need be looked at.
inline float largest_but(int64_t k, const float *x, int64_t count, Room &room) {
    float bound = -FLT_MAX, *values = room.values.data();
    auto kth = [&](int64_t found) {
        std::nth_element(values, values + k - 1, values + found, std::greater<float>());
        return values[k - 1];
    };
    int64_t lanes = chunks_of(count) * LANES, found = 0;
    if (k <= lanes) {
        std::copy(room.lanes.begin(), room.lanes.begin() + lanes, values);
        bound = std::max(bound, kth(lanes));
    }
    for (int64_t c = 0, from = 0; from < count; c++, from += SPAN) {
        if (!(room.tops[c] >= bound)) continue;
        int64_t to = std::min(from + SPAN, count), i = from;
        for (; i + 4 * LANES <= to; i += 4 * LANES) {
            Vec tops = broadcast(-INFINITY);
            for (int64_t j = i; j < i + 4 * LANES; j += LANES) tops = load(x + j) > tops ? load(x + j) : tops;
            if (!(hmax(tops) >= bound)) continue;
            for (int64_t j = i; j < i + 4 * LANES; j++) values[found] = x[j], found += x[j] >= bound;
        }
        for (; i < to; i++) values[found] = x[i], found += x[i] >= bound;
    }
    return found < k ? -FLT_MAX : kth(found);
}

// Cut to the fewest most likely tokens whose share is `top_p` at least; of equally likely ones the first.
// Weights are added up in bins of nearly equal ones, and the logits of the bin where the share is reached are
// sorted.
inline void keep_nucleus(double top_p, const float *x, int64_t count, Softmax &soft, Room &room) {
    constexpr int64_t BINS = 2048, LAST = BINS - 1;  // the last one takes all that is smaller
    constexpr float BINS_PER_UNIT = 100.f;           // of the exponent
    constexpr int64_t COPIES = 4;  // of the bins: neighbours, often of one bin, need not wait for each other
    auto bin_of = [&](Vec v) {  // never falls as logits fall; the last for what is no number
        Vec bin = (soft.top - v) * soft.slope * BINS_PER_UNIT;
        return __builtin_convertvector(bin < broadcast(LAST) ? bin : broadcast(LAST), IntVec);
    };
    auto each_chunk = [&](float least, auto &&visit) {
        for (int64_t c = 0, from = 0; from < count; c++, from += SPAN)
            if (room.tops[c] >= least) visit(c, from, std::min(from + SPAN, count));
    };
    double bins[BINS][COPIES] = {}, sum = 0, above = 0;
    float weights[SPAN];
    // tokens of less than `least` weigh less than what may be left out, all together
    double least = .5 * (1 - top_p) / count;  // of a sum that is 1 at least
    float lowest = std::max(soft.cut, (float)(soft.top + std::log(std::max(least, DBL_MIN)) / soft.slope));
    each_chunk(soft.cut, [&](int64_t c, int64_t from, int64_t to) {
        sum += weigh(soft, x, from, to, weights);
        if (room.tops[c] < lowest) return;
        int64_t i = from;
        for (; i + LANES <= to; i += LANES) {
            IntVec at = bin_of(load(x + i));
            for (int j = 0; j < LANES; j++) bins[at[j]][j % COPIES] += weights[i - from + j];
        }
        for (; i < to; i++) bins[bin_of(broadcast(x[i]))[0]][0] += weights[i - from];
    });
    double wanted = std::max(top_p, (double)FLT_MIN) * sum;  // the most likely token stays
    int64_t bin = 0, found = 0;
    for (; bin < LAST; bin++) {
        double here = 0;
        for (double part : bins[bin]) here += part;
        if (above + here >= wanted) break;
        above += here;
    }
    float *values = room.values.data();
    each_chunk(lowest, [&](int64_t c, int64_t from, int64_t to) {
        if (bin_of(broadcast(room.tops[c]))[0] > bin) return;
        int64_t i = from;
        for (; i + LANES <= to; i += LANES) {
            IntVec here = (bin_of(load(x + i)) == (int32_t)bin) & (load(x + i) >= broadcast(lowest));
            for (int j = 0; j < LANES && any(here); j++) values[found] = x[i + j], found -= here[j];
        }
        for (; i < to; i++)
            values[found] = x[i], found += bin_of(broadcast(x[i]))[0] == bin && x[i] >= lowest;
    });
    std::sort(values, values + found, std::greater<float>());
    double each = 0;
    for (int64_t i = 0, next = 0; i < found; i = next) {
        soft.cut = values[i], each = weight(soft, broadcast(soft.cut))[0];
        while (next < found && values[next] == values[i]) next++;
        if (next == found || above + (next - i) * each >= wanted) break;
        above += (next - i) * each;
    }
    double equals = each > 0 ? std::ceil((wanted - above) / each) : count;
    int64_t left = std::max((int64_t)1, (int64_t)std::min(equals, (double)count)), last = count - 1;
    each_chunk(soft.cut, [&](int64_t, int64_t from, int64_t to) {
        for (int64_t i = from; i < to && left >= 0; i += LANES) {
            if (i + LANES <= to && !any(load(x + i) == broadcast(soft.cut))) continue;
            for (int64_t j = i; j < std::min(i + LANES, to) && left >= 0; j++)
                if (x[j] == soft.cut && left-- > 0) last = j;
        }
    });
    if (left < 0) soft.last = last;
}

// Describe a row; `sums` [chunks] get the weights' sums.
inline void describe(const float *x, int64_t count, const Setting &setting, Softmax &soft, double *sums) {
    Room &room = room_for(count);
    soft.top = maxima(x, count, room);
    soft.best = 0, soft.last = count - 1, soft.cut = -FLT_MAX, soft.total = 1;
    while (soft.best < count && x[soft.best] != soft.top) {
        bool elsewhere = soft.best % SPAN == 0 && room.tops[soft.best / SPAN] != soft.top;
        soft.best += elsewhere ? SPAN : 1;
    }
    if (soft.best >= count || soft.top == -INFINITY) soft.best = 0;  // no number above -infinity
    soft.slope = (float)std::min(1 / setting.temperature, (double)FLT_MAX);
    soft.single = !(setting.temperature > 0) || !std::isfinite(soft.top);
    if (!soft.single) {
        if (setting.top_k > 0 && setting.top_k < count) soft.cut = largest_but(setting.top_k, x, count, room);
        if (setting.top_p < 1) keep_nucleus(setting.top_p, x, count, soft, room);
        float least = setting.min_p > 0
                          ? std::min(soft.top, (float)(soft.top + std::log(setting.min_p) / soft.slope))
                          : -FLT_MAX;
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

// The first token at which the running sum of weights exceeds `uniform` times the total: `weigh_chunk(from,
// to, weights)` gives those of a chunk, `sums` are its sums. A token without weight never comes.
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
