// Products on a processor with tiles (AMX), which multiply 16 tokens by 16 rows and 32 columns at once: up to
// 16 tokens then cost hardly more than one, since reading the weights takes the time. Each float32 number of
// the input is the sum of three bfloat16 numbers, so the products are exact and the sums float32, as
// elsewhere, but for pairs of columns added together, denormals taken as 0, and infinities, which give NaN; a
// token's sums do not depend on the tokens beside it.
//   TILES  bfloat16 [rows / 16][cols / 32][16 pairs of columns][16 rows][2], columns filled up with zeros
#pragma once
#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "types.h"
#include "vectors.h"

constexpr int64_t TILE_TOKENS = 16, TILE_COLS = 32, PARTS = 3, TILE_SIZE = 16 * TILE_COLS;
constexpr int64_t TILE_PANELS = 4;   // multiplied at once
constexpr int64_t TOKENS_AT_ONCE = 64;  // whose parts a thread keeps
constexpr int64_t TILES_AHEAD = 16;  // of a panel, fetched into the cache before their use

// The kernel gives a process the use of tiles when it asks (Linux, Documentation/arch/x86/xstate.rst).
inline bool tiles_allowed() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// Tokens in groups of `size` as bfloat16 [groups][cols / 32][PARTS][size][32]; what is beyond is zero.
inline const Half *split_tokens(const float *x, int64_t tokens, int64_t size, int64_t cols) {
    static thread_local std::vector<Half> memory;
    int64_t blocks = (cols + TILE_COLS - 1) / TILE_COLS, groups = (tokens + size - 1) / size;
    memory.resize(groups * size * blocks * PARTS * TILE_COLS);
    for (int64_t t = 0; t < groups * size; t++)
        for (int64_t b = 0; b < blocks; b++) {
            Half *to = memory.data() + ((t / size * blocks + b) * PARTS * size + t % size) * TILE_COLS;
            float rest[TILE_COLS] = {};
            int64_t count = t < tokens ? std::min(TILE_COLS, cols - b * TILE_COLS) : 0;
            if (count) std::memcpy(rest, x + t * cols + b * TILE_COLS, count * sizeof(float));
            for (int64_t part = 0; part < PARTS; part++, to += size * TILE_COLS)
                for (int64_t i = 0; i < TILE_COLS; i++) {  // the upper half of the bits, and what it leaves
                    uint32_t bits;
                    std::memcpy(&bits, rest + i, sizeof bits);
                    to[i] = bits >> 16, bits &= 0xffff0000u;
                    float upper;
                    std::memcpy(&upper, &bits, sizeof upper);
                    rest[i] -= upper;
                }
        }
    return memory.data();
}

// Sizes of the tiles: 0 to 3 sums of a panel, 4 its weights, 5 to 7 the parts of the tokens.
inline void configure_tiles(int64_t tokens) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } sizes;
    for (int tile = 0; tile < 8; tile++) sizes.bytes[tile] = 64, sizes.rows[tile] = tile == 4 ? 16 : tokens;
    asm volatile("" : : "r"(&sizes) : "memory");  // GCC's functions do not say that they read memory
    _tile_loadconfig(&sizes);
}

// Adds one block of columns to the sums of a panel, whose tile must be a constant.
#define ADD_PANEL(panel)                           \
    if constexpr (P > panel) {                     \
        _tile_loadd(4, w + panel * whole, 64);     \
        _tile_dpbf16ps(panel, 5, 4);               \
        _tile_dpbf16ps(panel, 6, 4);               \
        _tile_dpbf16ps(panel, 7, 4);               \
    }

// Sums of a group of tokens with P panels into out [P][size][16]. `fetch`: the panels are not in a cache yet.
template <int P>
void multiply_tiles(const Half *w, int64_t blocks, const Half *x, int64_t size, bool fetch, float *out) {
    int64_t whole = blocks * TILE_SIZE, part = size * TILE_COLS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = 0; b < blocks; b++, w += TILE_SIZE, x += PARTS * part) {
        for (int64_t i = 0; fetch && i < P * TILE_SIZE; i += 32)
            __builtin_prefetch(w + i / TILE_SIZE * whole + i % TILE_SIZE + TILES_AHEAD * TILE_SIZE);
        _tile_loadd(5, x, 64);
        _tile_loadd(6, x + part, 64);
        _tile_loadd(7, x + 2 * part, 64);
        ADD_PANEL(0)
        ADD_PANEL(1)
        ADD_PANEL(2)
        ADD_PANEL(3)
    }
    _tile_stored(0, out, 64);
    if constexpr (P > 1) _tile_stored(1, out + size * 16, 64);
    if constexpr (P > 2) _tile_stored(2, out + size * 32, 64);
    if constexpr (P > 3) _tile_stored(3, out + size * 48, 64);
}
#undef ADD_PANEL

// As `multiply_range` in matrix.h, of at most TOKENS_AT_ONCE tokens.
template <typename Emit>
void multiply_some_tokens(const Half *panels, int64_t from, int64_t end, int64_t cols, const float *x,
                          int64_t tokens, const Emit &emit) {
    constexpr decltype(&multiply_tiles<1>) kernels[] = {multiply_tiles<1>, multiply_tiles<2>,
                                                        multiply_tiles<3>, multiply_tiles<4>};
    int64_t blocks = (cols + TILE_COLS - 1) / TILE_COLS, groups = (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    int64_t size = (tokens + groups - 1) / groups;
    const Half *split = split_tokens(x, tokens, size, cols);
    float sums[TILE_PANELS * TILE_TOKENS * 16];
    configure_tiles(size);
    for (int64_t p = from; p < end; p += TILE_PANELS) {
        int64_t count = std::min(TILE_PANELS, end - p);
        for (int64_t g = 0; g < groups; g++) {
            const Half *group = split + g * size * blocks * PARTS * TILE_COLS;
            kernels[count - 1](panels + p * blocks * TILE_SIZE, blocks, group, size, g == 0, sums);
            asm volatile("" : : "r"(sums) : "memory");
            int64_t first = g * size, used = std::min(size, tokens - first);
            for (int64_t q = 0; q < count; q++)
                for (int64_t t = 0; t < used; t++) {
                    const float *sum = sums + (q * size + t) * 16;
                    emit(p + q, first + t, load(sum), load(sum + LANES));
                }
        }
    }
    _tile_release();
}

// As `multiply_range` in matrix.h.
template <typename Emit>
void multiply_tile_range(const Half *panels, int64_t from, int64_t end, int64_t cols, const float *x,
                         int64_t tokens, const Emit &emit) {
    for (int64_t first = 0; from < end && first < tokens; first += TOKENS_AT_ONCE)
        multiply_some_tokens(
            panels, from, end, cols, x + first * cols, std::min(TOKENS_AT_ONCE, tokens - first),
            [&](int64_t panel, int64_t t, Vec low, Vec high) { emit(panel, first + t, low, high); });
}
#endif
