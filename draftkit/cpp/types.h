// What Python hands over; native.py has the same structures, field by field.
#pragma once
#include <cstdint>

#include "sampling.h"

typedef uint16_t Half;  // the upper half of a float32, rounded: bfloat16
enum Kind { FLOATS, HALVES, TILES };

extern "C" {
struct Matrix {
    const void *panels;
    int64_t rows, cols, kind;  // see matrix.h
};
struct Layer {  // names as in stack.py; null (window, score_cap: 0) where a family has no such part
    int64_t heads, kv_heads, head_dim, window, value_norm;
    float scale, score_cap, output_scale;
    const float *input_norm, *qkv_bias, *qk_norm, *out_bias, *post_attention_norm, *mlp_norm, *mlp_out_norm,
        *rotary;
    void *memory;  // [slots, M, 2 D], float or Half
    Matrix qkv, out, gate_up, down;
};
struct Stack {
    int64_t layers, hidden, gelu, half;  // `half`: keys and values are bfloat16
    float eps;
    const Layer *layer;
};
struct Ends {  // what lies before and after the layers
    int64_t vocab, half;
    const void *embedding;  // float, or with `half` bfloat16
    const float *norm;
    float embedding_scale, logit_scale, logit_cap;
    Matrix head;
};
struct Step {
    int64_t tokens, requests, block_size, table_width, wanted, captures, block,
        threads;             // `block`: as in passes.py
    const int64_t *numbers;  // token, start, length, table, want, capture, one after the other
    float *features, *hidden, *logits;  // [T, captures H], [W, H], [W, V]
    int64_t *best;  // [W], the first largest logit of each wanted row; null when nobody asks
};
struct Context {  // a drafter's context features to keys and values of all its layers
    Matrix fc, kv;  // [H, F], [2 L M D, H]
    const float *norm, *k_norm;  // [H], [L, D]
};
enum HeadKind { MARKOV, GATED, RNN };
enum Part { ALL, LOGITS, TOKENS };
struct SequentialHead {  // W1 [V, r], W2 [C, r], joint matrix and bias of the gated and RNN heads (see
                         // draft/heads.py); confidence:
    int64_t kind;        // weights [H (+ r)] and bias; null where there is none
    const float *w1;
    Matrix w2, joint;
    const float *joint_bias, *confidence;
    int64_t confidence_size;
    float confidence_bias;
};
struct Draft {
    int64_t requests, positions, hidden, columns, row,
        threads;             // `row`: numbers from one row of logits to the next
    int64_t from, to, part;  // positions to draft, and what of them: the logits, the tokens, or both
    const float *states;     // [R, G, H]
    float *logits;           // base logits [R, G, row], those of the chosen prefix when done
    float *confidence, *largest, *memory;  // [R, G] each or null; states of an RNN head [R, r]
    const int64_t *anchors, *ids;          // tokens of the columns, null where they are the same
    int64_t *tokens;                       // [R, G]
    const Setting *settings;               // [R], null: all greedy, and the rest is not looked at
    const double *uniforms;                // [R, G]
    Softmax *softmaxes;                    // [R, G]
    double *sums, *chances;                // [R, G, chunks], and the probabilities of the tokens [R, G]
};
}
