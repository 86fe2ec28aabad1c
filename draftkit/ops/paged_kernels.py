"""The Triton kernels of a layer, called by `paged_attention.py`; shapes as there.

Capital arguments are known when a kernel is compiled.
"""

import triton
import triton.language as tl

# One compiled kernel for all passes: no variant for a number that is 1 or a multiple of 16, none for how
# indices are aligned.
INDICES = ("first", "count", "row", "seen", "origins", "tables", "width", "positions", "slots")


@triton.jit(do_not_specialize_on_alignment=INDICES)
def store_kernel(
    qkv, qk_norm, rotary, positions, slots, memory, queries, eps,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    VALUE_NORM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, D // 2)[None]
    there = head < N + 2 * M
    is_value = head >= N + M
    source = qkv + token * (N + 2 * M) * D + head * D + 2 * pair
    x = tl.load(source, mask=there, other=0.0).to(tl.float32)
    y = tl.load(source + 1, mask=there, other=0.0).to(tl.float32)
    if NORM or VALUE_NORM:
        rms = tl.rsqrt(tl.sum(x * x + y * y, 1)[:, None] / D + eps)
        if not NORM:
            rms = tl.where(is_value, rms, 1.0)
        if not VALUE_NORM:
            rms = tl.where(is_value, 1.0, rms)
        x, y = x * rms, y * rms
    if NORM:
        weight = qk_norm + head * D + 2 * pair
        x *= tl.load(weight, mask=there & (head < N + M), other=1.0).to(tl.float32)
        y *= tl.load(weight + 1, mask=there & (head < N + M), other=1.0).to(tl.float32)
    turn = rotary + tl.load(positions + token) * D + 2 * pair
    cos = tl.where(is_value, 1.0, tl.load(turn))
    sin = tl.where(is_value, 0.0, tl.load(turn + 1))
    x, y = x * cos - y * sin, x * sin + y * cos
    is_query = head < N
    target = queries + token * N * D + head * D + 2 * pair
    tl.store(target, x.to(queries.dtype.element_ty), mask=is_query)
    tl.store(target + 1, y.to(queries.dtype.element_ty), mask=is_query)
    # keys of head m lie at [m, 0, :], its values at [m, 1, :]
    kv = tl.where(is_value, (head - N - M) * 2 + 1, (head - N) * 2)
    target = memory + tl.load(slots + token) * (2 * M * D) + kv * D + 2 * pair
    tl.store(target, x.to(memory.dtype.element_ty), mask=there & (head >= N))
    tl.store(target + 1, y.to(memory.dtype.element_ty), mask=there & (head >= N))


@triton.jit(do_not_specialize=("tokens",), do_not_specialize_on_alignment=INDICES)
def attend_kernel(
    queries, memory, first, count, row, seen, origins, tables, width, parts, weights,
    tokens, scale, cap, window,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, FOLD: tl.constexpr,
    FOLD_2: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One tile, one key/value head, one split of the keys: a running softmax over KEYS keys at a time."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    held = tl.load(count + tile)
    if held > 0:
        line = tl.arange(0, ROWS)  # query heads of one token lie side by side
        real = (line // FOLD_2 < held) & (line % FOLD_2 < FOLD)
        token = tl.load(first + tile) + line // FOLD_2
        cell = token * N + kv_head * FOLD + line % FOLD_2  # of [T, N]
        d = tl.arange(0, D)
        q = tl.load(queries + cell[:, None] * D + d[None], mask=real[:, None], other=0.0)
        until = tl.load(seen + token, mask=real, other=0)
        begin = 0
        if WINDOW:
            least = tl.load(origins + token, mask=real, other=1 << 40) - window
            begin = tl.maximum(tl.min(least, 0), 0) // KEYS * KEYS
        end = tl.max(until, 0)
        share = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
        begin += split * share
        end = tl.minimum(end, begin + share)
        blocks = tables + tl.load(row + tile) * tl.load(width)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, D], tl.float32)
        for start in range(begin, end, KEYS):
            position = start + tl.arange(0, KEYS)
            there = position < end
            slot = tl.load(blocks + position // BLOCK, mask=there, other=0) * BLOCK + position % BLOCK
            source = memory + (slot[:, None] * M + kv_head) * (2 * D) + d[None]
            k = tl.load(source, mask=there[:, None], other=0.0)
            v = tl.load(source + D, mask=there[:, None], other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # of no effect on halves
            if CAP:
                score = cap * (2 * tl.sigmoid(2 * score / cap) - 1)
            visible = position[None] < tl.minimum(until, end)[:, None]
            if WINDOW:
                visible = visible & (position[None] >= least[:, None])
            score = tl.where(visible, score, float("-inf"))
            above = tl.maximum(largest, tl.max(score, 1))
            base = tl.where(above == float("-inf"), 0.0, above)  # nothing seen yet: no NaN from inf - inf
            p = tl.exp(score - base[:, None])
            fade = tl.exp(largest - base)
            total = total * fade + tl.sum(p, 1)
            mixed = mixed * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            largest = above
        total = tl.where(total == 0, 1.0, total)  # of a split that has no keys; its `largest` is -inf
        mixed = mixed / total[:, None]
        target = parts + (split.to(tl.int64) * tokens * N + cell)[:, None] * D + d[None]
        tl.store(target, mixed.to(parts.dtype.element_ty), mask=real[:, None])
        if SPLITS > 1:
            tl.store(weights + split.to(tl.int64) * tokens * N + cell, largest + tl.log(total), mask=real)


@triton.jit(do_not_specialize=("tokens",))
def join_kernel(parts, weights, out, tokens, N: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """The splits of one token and query head, each weighed by its share of the softmax's sum."""
    cell = tl.program_id(0).to(tl.int64) * N + tl.program_id(1)
    largest = float("-inf")
    for split in tl.static_range(SPLITS):
        largest = tl.maximum(largest, tl.load(weights + split * tokens * N + cell))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = 0.0
    mixed = tl.zeros([D], tl.float32)
    d = tl.arange(0, D)
    for split in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(weights + split * tokens * N + cell) - largest)
        total += weight
        mixed += weight * tl.load(parts + (split * tokens * N + cell) * D + d)
    tl.store(out + cell * D + d, (mixed / total).to(out.dtype.element_ty))


@triton.jit
def norm_kernel(x, weight, out, eps, H: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of one row."""
    row = tl.program_id(0).to(tl.int64) * H
    h = tl.arange(0, BLOCK)
    values = tl.load(x + row + h, mask=h < H, other=0.0).to(tl.float32)
    scaled = values * tl.rsqrt(tl.sum(values * values, 0) / H + eps)
    scaled *= tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out + row + h, scaled.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def gate_kernel(gate_up, out, I: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    """A part of one row of the MLP: SiLU or tanh GELU of the gate, times what goes up."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    if GELU:  # x sigmoid(2 y) is x (1 + tanh(y)) / 2
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate *= tl.sigmoid(gate)
    tl.store(out + row * I + i, (gate * up).to(out.dtype.element_ty), mask=i < I)
