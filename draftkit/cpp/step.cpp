// One pass of a transformer stack over flattened tokens and paged keys and values, as one function: what
// `Stack.run` does in a hundred PyTorch operations. Compiled at first use (see native.py); plain C interface,
// no padding, any number of tokens.
//
// The threads share one parallel region. Each keeps its own copy of the residual stream and of the normed
// input, so that a layer needs five barriers only: after qkv, attention, out, gate/up and down. Every sum is
// taken in one order, so a token's result is the same to the bit alone, in any batch and with any number of
// threads.
#include <omp.h>

#include "attention.h"
#include "drafting.h"

namespace {

// Cuts pieces from one allocation that the calling thread keeps; the first round of `take` only counts.
struct Workspace {
    float *base = nullptr;
    int64_t used = 0;
    float *take(int64_t count) {
        float *piece = base ? base + used : nullptr;
        used += (count + PANEL - 1) / PANEL * PANEL;
        return piece;
    }
};
float *reserve(int64_t count) {
    static thread_local std::vector<float> memory;
    if ((int64_t)memory.size() < count) memory.resize(count);
    return memory.data();
}

struct Shared {
    float *qkv, *mixed, *y, *act;
};
struct Own {
    float *x, *normed, *scores;
    int64_t positions;  // room for scores of one query
    const void **rows;
};

// x = (x + y) * scale, with a norm of y first where the family has one; then normed = norm(x).
void add(const Stack &stack, const Placed &step, const float *y, const float *y_norm, float scale,
         const float *next_norm, Own &own) {
    int64_t H = stack.hidden;
    for (int64_t t = 0; t < step.tokens; t++) {
        float *x = own.x + t * H, *normed = own.normed + t * H;
        const float *from = y + t * H;
        if (y_norm) rms_norm(normed, from, y_norm, H, stack.eps), from = normed;
        for (int64_t i = 0; i < H; i += LANES) store(x + i, (load(x + i) + load(from + i)) * scale);
        if (next_norm) rms_norm(normed, x, next_norm, H, stack.eps);
    }
}

template <typename K>
void run_layers(const Stack &stack, const Placed &step, const Shared &shared, Own &own, int64_t thread,
                int64_t threads) {
    int64_t T = step.tokens, H = stack.hidden;
    for (int64_t t = 0; t < T; t++)
        rms_norm(own.normed + t * H, own.x + t * H, stack.layer[0].input_norm, H, stack.eps);
    for (int64_t index = 0, captured = 0; index < stack.layers; index++) {
        const Layer &layer = stack.layer[index];
        multiply(layer.qkv, own.normed, T, thread, threads, Into{shared.qkv, layer.qkv.rows, layer.qkv_bias});
#pragma omp barrier
        for (int64_t unit = thread; unit < step.requests * layer.kv_heads; unit += threads)
            attend(stack, layer, step, unit / layer.kv_heads, unit % layer.kv_heads, shared.qkv, shared.mixed,
                   own.scores, own.positions, (const K **)own.rows);
#pragma omp barrier
        multiply(layer.out, shared.mixed, T, thread, threads, Into{shared.y, H, layer.out_bias});
#pragma omp barrier
        add(stack, step, shared.y, layer.post_attention_norm, 1.f, layer.mlp_norm, own);
        bool gelu = stack.gelu;
        float *act = shared.act;
        int64_t inner = layer.down.cols;
        multiply(layer.gate_up, own.normed, T, thread, threads,
                 [=](int64_t panel, int64_t t, Vec gate, Vec up) {
                     store(act + t * inner + panel * LANES,
                           activate(gate, gelu) * up);  // a panel holds 8 rows of each
                 });
#pragma omp barrier
        multiply(layer.down, shared.act, T, thread, threads, Into{shared.y, H, nullptr});
#pragma omp barrier
        bool last = index + 1 == stack.layers;
        add(stack, step, shared.y, layer.mlp_out_norm, layer.output_scale,
            last ? nullptr : stack.layer[index + 1].input_norm, own);
        if (captured < step.captures && step.capture[captured] == index) {
            if (thread == 0)
                for (int64_t t = 0; t < T; t++)
                    std::memcpy(step.features + (t * step.captures + captured) * H, own.x + t * H,
                                H * sizeof(float));
            captured++;
        }
    }
}

}  // namespace

// Whether matrices of this kind can be multiplied here.
extern "C" int64_t can_multiply(int64_t kind) {
#ifdef __AMX_BF16__
    if (kind == TILES) return tiles_allowed();
#endif
    return kind != TILES;
}

// Reads the step's tokens into the layers' memories; fills features, normed hidden states, logits and largest
// logits of the wanted rows.
extern "C" void run_step(const Stack *stack, const Ends *ends, const Step *given) {
    const Placed placed(*given), *step = &placed;
    int64_t T = step->tokens, H = stack->hidden, threads = step->threads;
    int64_t rows = T > step->wanted ? T : step->wanted,
            positions = step->table_width * step->block_size + PANEL;
    int64_t qkv = 0, mixed = 0, inner = 0;
    for (const Layer *layer = stack->layer; layer < stack->layer + stack->layers; layer++) {
        qkv = std::max(qkv, layer->qkv.rows), mixed = std::max(mixed, layer->out.cols);
        inner = std::max(inner, layer->down.cols);
    }
    Shared shared;
    std::vector<Own> owns(threads);
    for (Workspace space;; space.used = 0) {
        shared.qkv = space.take(T * qkv + PANEL);
        shared.mixed = space.take(T * mixed);
        shared.y = space.take(T * H + PANEL);
        shared.act = space.take(T * inner + PANEL);
        for (Own &own : owns) {
            own.x = space.take(T * H);
            own.normed = space.take(rows * H);
            own.scores = space.take(TOGETHER * positions);
            own.positions = positions;
            own.rows = (const void **)space.take(2 * positions);
        }
        if (space.base) break;
        space.base = reserve(space.used);
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        Own &own = owns[thread];
        for (int64_t t = 0; t < T; t++)
            for (int64_t i = 0, at = step->token[t] * H; i < H; i += LANES) {
                Vec row = ends->half ? load((const Half *)ends->embedding + at + i)
                                     : load((const float *)ends->embedding + at + i);
                store(own.x + t * H + i, row * ends->embedding_scale);
            }
        if (stack->half) run_layers<Half>(*stack, *step, shared, own, thread, count);
        else run_layers<float>(*stack, *step, shared, own, thread, count);
        for (int64_t w = 0; w < step->wanted; w++)
            rms_norm(own.normed + w * H, own.x + step->want[w] * H, ends->norm, H, stack->eps);
        if (thread == 0) std::memcpy(step->hidden, own.normed, step->wanted * H * sizeof(float));
        float scale = ends->logit_scale, limit = ends->logit_cap;
        Into into{step->logits, ends->head.rows, nullptr};
        multiply(ends->head, own.normed, step->wanted, thread, count,
                 [=](int64_t p, int64_t t, Vec low, Vec high) {
                     low *= scale, high *= scale;
                     for (int i = 0; limit > 0 && i < LANES; i++)
                         low[i] = cap(low[i], limit), high[i] = cap(high[i], limit);
                     into(p, t, low, high);
                 });
        if (step->best) {
#pragma omp barrier
            for (int64_t w = thread; w < step->wanted; w += count)
                step->best[w] = largest(step->logits + w * into.rows, 0, ends->vocab);
        }
    }
}

// Projects context features [T, F] and writes the keys and values of every layer at the step's slots.
extern "C" void write_context(const Stack *stack, const Context *context, const Step *given,
                              const float *features) {
    const Placed placed(*given), *step = &placed;
    int64_t T = step->tokens, H = stack->hidden, L = stack->layers;
    int64_t M = stack->layer->kv_heads, D = stack->layer->head_dim;
    int64_t width = context->kv.rows;
    float *y, *kv;
    std::vector<Own> owns(step->threads);
    for (Workspace space;; space.used = 0) {
        y = space.take(T * H + PANEL);
        kv = space.take(T * width + PANEL);
        for (Own &own : owns) own.normed = space.take(T * H);
        if (space.base) break;
        space.base = reserve(space.used);
    }
#pragma omp parallel num_threads(step->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Own &own = owns[thread];
        multiply(context->fc, features, T, thread, threads, Into{y, H, nullptr});
#pragma omp barrier
        for (int64_t t = 0; t < T; t++) rms_norm(own.normed + t * H, y + t * H, context->norm, H, stack->eps);
        multiply(context->kv, own.normed, T, thread, threads, Into{kv, width, nullptr});
#pragma omp barrier
        for (int64_t unit = thread; unit < L * T; unit += threads) {
            int64_t l = unit / T, t = unit % T;
            const Layer &layer = stack->layer[l];
            for (int64_t m = 0; m < M; m++) {
                float *k = kv + t * width + (l * M + m) * D, *v = k + L * M * D;
                const float *norm = context->k_norm ? context->k_norm + l * D : nullptr;
                int64_t at = (step->slot[t] * M + m) * 2 * D, position = step->position[t];
                if (stack->half)
                    store_key_value(layer, k, v, norm, position, (Half *)layer.memory + at, stack->eps);
                else store_key_value(layer, k, v, norm, position, (float *)layer.memory + at, stack->eps);
            }
        }
    }
}
