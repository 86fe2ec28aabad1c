// Eight floats at a time, in the compiler's own vector types: AVX2 has registers for them, others get two
// halves.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(32)));
typedef uint32_t UintVec __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(16), aligned(2), may_alias));
constexpr int64_t LANES = 8;

inline Vec load(const float *p) { return *(const Vec *)p; }
inline Vec load(const uint16_t *p) {
    return (Vec)(__builtin_convertvector(*(const HalfVec *)p, UintVec) << 16);
}  // bfloat16
inline void load_rows(const float *p, Vec &low, Vec &high) { low = load(p), high = load(p + LANES); }
inline void load_rows(const uint16_t *p, Vec &low, Vec &high) {
    UintVec both = *(const UintVec *)p;
    low = (Vec)(both << 16), high = (Vec)(both & 0xffff0000u);
}
inline void keep(Vec &v) {  // in a register: GCC would rather read it again for each use, at the price of the
                            // loads of others
#ifdef __AVX__
    asm("" : "+x"(v));
#endif
}
inline void store(float *p, Vec v) { *(Vec *)p = v; }
inline void store(uint16_t *p,
                  Vec v) {  // rounded to the nearest bfloat16, of two equally near ones to the even
    UintVec bits = (UintVec)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *(HalfVec *)p = __builtin_convertvector(v == v ? rounded : bits >> 16 | 64, HalfVec);
}
inline Vec broadcast(float x) { return Vec{x, x, x, x, x, x, x, x}; }
inline Quad halves(Vec v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
inline Quad hsum4(Vec a, Vec b, Vec c, Vec d) {  // the sum of each
    Quad p = halves(a), q = halves(b), r = halves(c), s = halves(d);
    Quad pq = __builtin_shufflevector(p, q, 0, 1, 4, 5) + __builtin_shufflevector(p, q, 2, 3, 6, 7);
    Quad rs = __builtin_shufflevector(r, s, 0, 1, 4, 5) + __builtin_shufflevector(r, s, 2, 3, 6, 7);
    return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
}
inline bool any(IntVec mask) {
    typedef int64_t Longs __attribute__((vector_size(32)));
    Longs both = (Longs)mask;
    return (both[0] | both[1] | both[2] | both[3]) != 0;
}
inline float hmax(Vec v) {
    float top = v[0];
    for (int64_t i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}
inline float hsum(Vec v) {
    Quad h = halves(v);
    return (h[0] + h[2]) + (h[1] + h[3]);
}

// exp to 2 units in the last place for x <= 88; below -87 it gives 0 (nearly). Cody-Waite reduction,
// polynomial of Cephes.
inline Vec exponential(Vec x) {
    x = x > broadcast(-87.f) ? x : broadcast(-87.f);
    x = x < broadcast(88.f) ? x : broadcast(88.f);
    Vec scaled = x * 1.44269504088896341f + broadcast(12582912.f);  // round to nearest by adding 1.5 * 2^23
    IntVec n = (IntVec)scaled - (IntVec)broadcast(12582912.f);
    Vec k = scaled - broadcast(12582912.f);
    Vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * (Vec)((n + 127) << 23);
}
inline Vec sigmoid(Vec x) { return 1.f / (1.f + exponential(-x)); }
inline Vec
activate(Vec gate,
         bool gelu) {  // silu, or gelu in its tanh form: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    return gate * sigmoid(gelu ? 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate) : gate);
}
inline float cap(float x, float limit) { return limit > 0 ? limit * std::tanh(x / limit) : x; }

void rms_norm(float *out, const float *x, const float *weight, int64_t size, float eps) {
    Vec squares = {};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    Vec factor = broadcast(1.f / std::sqrt(hsum(squares) / size + eps));
    for (int64_t i = 0; i < size; i += LANES) {
        Vec scaled = load(x + i) * factor;
        store(out + i, weight ? scaled * load(weight + i) : scaled);
    }
}
