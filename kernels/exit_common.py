"""Device functions that end every exit: pooled features → logits → confidence → results of exits, survivors.

    logits = weight · pooled + bias;  confidence = criterion(logits);  exits = confidence > threshold, or < for entropy

With a rule that carries (`eefast/criteria.py`), logits and confidence are those of the answer so far: the sample's
result row, which the exit before has written, goes into them, and that of every live sample is written.

The survivor list is a single-pass scan with decoupled look-back (Merrill & Garland, Single-pass Parallel Prefix Scan,
2016) over tiles of the live list: each tile moves 16 bytes per entry and waits only for tiles that have started before.
"""

import functools

import triton
import triton.language as tl

# One compilation for all batch sizes, exits and places of a threshold or a rule among its neighbours.
ends_an_exit = functools.partial(
    triton.jit,
    do_not_specialize=["size", "samples", "results", "exit_index"],
    do_not_specialize_on_alignment=["threshold", "rule"],
)


@triton.jit
def begin_tile(workspace, live, size, ROWS: tl.constexpr):
    """The next tile: its number, its entries of the live list, how many entries of the list count, which of its do."""
    tile = tl.atomic_add(workspace, 1, sem="relaxed")
    entry = tile * ROWS + tl.arange(0, ROWS)
    count = tl.minimum(tl.load(live), size)
    return tile, entry, count, entry < count


@triton.jit
def classify(
    pooled, weight, bias, scratch, entry, alive,
    CHANNELS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Logits and confidence row of ROWS entries into `scratch`, [R, CLASSES + 1] float32.

    pooled: [R, CHANNELS] float32, written by the same program before a barrier.
    """
    for first in range(0, CLASSES + 1, BLOCK_CLASSES):
        row = first + tl.arange(0, BLOCK_CLASSES)
        sums = tl.zeros([ROWS, BLOCK_CLASSES], tl.float32)
        for start in range(0, CHANNELS, BLOCK_CHANNELS):
            channel = start + tl.arange(0, BLOCK_CHANNELS)
            x = tl.load(
                pooled + entry[:, None].to(tl.int64) * CHANNELS + channel[None, :],
                mask=alive[:, None] & (channel[None, :] < CHANNELS),
                other=0.0,
            )
            w = tl.load(
                weight + row[None, :] * CHANNELS + channel[:, None],
                mask=(row[None, :] <= CLASSES) & (channel[:, None] < CHANNELS),
                other=0.0,
            )
            if ROWS >= 16:
                sums = tl.dot(x, w, sums, input_precision="tf32x3")
            else:
                sums += tl.sum(x[:, :, None] * w[None, :, :], axis=1)
        sums += tl.load(bias + row, mask=row <= CLASSES, other=0.0)[None, :]
        place = scratch + entry[:, None].to(tl.int64) * (CLASSES + 1) + row[None, :]
        tl.store(place, sums, mask=alive[:, None] & (row[None, :] <= CLASSES))
    tl.debug_barrier()


@triton.jit
def confidence_of(out, column, CLASSES: tl.constexpr, CRITERION: tl.constexpr):
    """The criteria of eefast/criteria.py in float32: [ROWS, columns] → [ROWS]."""
    if CRITERION == "learned":
        confidence_logit = tl.sum(tl.where(column == CLASSES, out, 0.0), axis=1)
        value = tl.div_rn(1.0, 1.0 + tl.exp(-confidence_logit))
    else:
        logits = tl.where(column < CLASSES, out, float("-inf"))
        first = tl.max(logits, axis=1)
        shifted = logits - first[:, None]
        powers = tl.exp(shifted)
        total = tl.sum(powers, axis=1)
        if CRITERION == "max_probability":
            value = tl.div_rn(1.0, total)
        elif CRITERION == "entropy":
            # 0 · log 0 = 0; a NaN is not 0 and stays NaN.
            moment = tl.sum(tl.where(powers == 0.0, 0.0, powers * shifted), axis=1)
            value = tl.log(total) - tl.div_rn(moment, total)
        else:
            tl.static_assert(CRITERION == "margin")
            best = tl.argmax(logits, axis=1)
            second = tl.max(tl.where(column == best[:, None], float("-inf"), logits), axis=1)
            value = tl.div_rn(1.0, total) - tl.div_rn(tl.exp(second - first), total)
    return value


@triton.jit
def best_class(out, column, CLASSES: tl.constexpr):
    """The first largest logit of each row, and whether none is NaN."""
    unknown = tl.max(((out != out) & (column < CLASSES)).to(tl.int32), axis=1)
    return tl.argmax(tl.where(column < CLASSES, out, float("-inf")), axis=1), unknown == 0


@triton.jit
def softplus(x):
    """log(1 + exp x), exact also where 1 + exp x rounds to 1."""
    power = tl.exp(-tl.abs(x))
    sum = 1.0 + power
    # The logarithm of the rounded sum, corrected by what the rounding has changed.
    logarithm = tl.where(sum == 1.0, power, tl.log(sum) * tl.div_rn(power, sum - 1.0))
    return tl.where(x > 0.0, x, 0.0) + logarithm


@triton.jit
def answer_so_far(
    out, column, inside, place, rule, logits, logits_row_stride, logits_column_stride, confidence, confidence_stride,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """Logits and confidence by a rule that carries: `out` with the logits so far, [ROWS] float32.

    rule: [9] float32: weights of σ(z), largest probability, -entropy, margin and softplus(z), a constant, what is kept
        of the confidence so far, and more where the class is the same, what is kept of the logits so far.
        A coefficient that is 0 leaves its term out: what it would multiply is not read.
    """
    keep, keep_if_same, keep_logits = tl.load(rule + 6), tl.load(rule + 7), tl.load(rule + 8)
    so_far = tl.zeros_like(out)
    if (keep_logits != 0.0) | (keep_if_same != 0.0):
        so_far = tl.load(
            logits + place[:, None] * logits_row_stride + column.to(tl.int64) * logits_column_stride,
            mask=inside[:, None] & (column < CLASSES),
            other=0.0,
        )
    value_so_far = tl.zeros([out.shape[0]], tl.float32)
    if (keep != 0.0) | (keep_if_same != 0.0):
        value_so_far = tl.load(confidence + place * confidence_stride, mask=inside, other=0.0)
    # Threads may hold copies of an element: all have read it before one of them writes it.
    tl.debug_barrier()
    if keep_logits != 0.0:
        out = tl.where(column < CLASSES, out + keep_logits * so_far, out)
    value = tl.zeros([out.shape[0]], tl.float32) + tl.load(rule + 5)
    weight = tl.load(rule)
    if weight != 0.0:
        value += weight * confidence_of(out, column, CLASSES, "learned")
    weight = tl.load(rule + 1)
    if weight != 0.0:
        value += weight * confidence_of(out, column, CLASSES, "max_probability")
    weight = tl.load(rule + 2)
    if weight != 0.0:
        value -= weight * confidence_of(out, column, CLASSES, "entropy")
    weight = tl.load(rule + 3)
    if weight != 0.0:
        value += weight * confidence_of(out, column, CLASSES, "margin")
    weight = tl.load(rule + 4)
    if weight != 0.0:
        value += weight * softplus(tl.sum(tl.where(column == CLASSES, out, 0.0), axis=1))
    if (keep != 0.0) | (keep_if_same != 0.0):
        kept = tl.zeros_like(value) + keep
        if keep_if_same != 0.0:
            best, known = best_class(out, column, CLASSES)
            best_so_far, known_so_far = best_class(so_far, column, CLASSES)
            kept += tl.where(best == best_so_far, keep_if_same, 0.0)
            kept = tl.where(known & known_so_far, kept, float("nan"))
        left_out = (kept == 0.0) & (value_so_far == value_so_far)
        value += tl.where(left_out, 0.0, kept * value_so_far)
    return out, value


@triton.jit
def survivors_before(status, tile, count, WINDOW: tl.constexpr):
    """Sum of `count` over all tiles before `tile`.

    status: one int32 word per tile, 0 at the launch: 4 · count + 1, then 4 · count of all tiles up to it + 2.
    WINDOW: one word per thread. With fewer, warps would hold copies, read at different moments, and diverge.
    """
    tl.atomic_xchg(status + tile, count * 4 + 1, sem="relaxed")
    distance = tl.arange(0, WINDOW)
    before = tile * 0
    end = tile
    while end > 0:
        index = end - 1 - distance
        word = tl.load(status + index, mask=index >= 0, other=2, volatile=True)
        nearest = tl.min(tl.where((word & 3) == 2, distance, WINDOW), axis=0)
        needed = distance <= nearest
        if tl.min(tl.where(needed, word & 3, 1), axis=0) > 0:
            before += tl.sum(tl.where(needed, word >> 2, 0), axis=0)
            end = tl.where(nearest < WINDOW, 0, end - WINDOW)
    tl.atomic_xchg(status + tile, (before + count) * 4 + 2, sem="relaxed")
    return before


@triton.jit
def answer(
    out, entry, alive, threshold, rule, positions, logits, logits_row_stride, logits_column_stride,
    confidence, confidence_stride, exits, exits_stride, results, exit_index,
    CLASSES: tl.constexpr, CRITERION: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, THRESHOLD_STRIDE: tl.constexpr,
):  # fmt: skip
    """Decide for the entries whose logits and confidence row are `out`; write the answers of those that exit.

    out: [ROWS, BLOCK_COLUMNS]. THRESHOLD_STRIDE: from the threshold of one place in the results to the next, of which
    NaN lets a sample exit in any case; -1: one threshold for all. Returns which survive, [ROWS] int32.
    rule: see `answer_so_far`, then the answers so far of those that survive are written too; None: of `CRITERION`.
    """
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if rule is None:
        value = confidence_of(out, column, CLASSES, CRITERION)
    else:
        so_far = tl.load(positions + entry, mask=alive, other=0)
        out, value = answer_so_far(
            out, column, alive & (so_far >= 0) & (so_far < results), so_far.to(tl.int64), rule,
            logits, logits_row_stride, logits_column_stride, confidence, confidence_stride, CLASSES,
        )  # fmt: skip
    if threshold is None:
        leaves = alive
    elif THRESHOLD_STRIDE >= 0:
        place_of = tl.load(positions + entry, mask=alive, other=0)
        inside = alive & (place_of >= 0) & (place_of < results)
        limit = tl.load(threshold + place_of.to(tl.int64) * THRESHOLD_STRIDE, mask=inside, other=0.0)
        if CRITERION == "entropy":
            leaves = inside & ((value < limit) | (limit != limit))
        else:
            leaves = inside & ((value > limit) | (limit != limit))
    elif CRITERION == "entropy":
        leaves = alive & (value < tl.load(threshold))
    else:
        leaves = alive & (value > tl.load(threshold))
    position = tl.load(positions + entry, mask=alive, other=0)
    tl.device_assert((position >= 0) & (position < results), "positions is out of range", mask=alive)
    place = position.to(tl.int64)
    answered = leaves if rule is None else alive
    tl.store(
        logits + place[:, None] * logits_row_stride + column.to(tl.int64) * logits_column_stride,
        out,
        mask=answered[:, None] & (column < CLASSES),
    )
    tl.store(confidence + place * confidence_stride, value, mask=answered)
    tl.store(exits + place * exits_stride, place * 0 + exit_index, mask=leaves)
    return (alive & (leaves == 0)).to(tl.int32)


@triton.jit
def answer_from(
    scratch, tile, count, threshold, rule, positions, logits, logits_row_stride, logits_column_stride,
    confidence, confidence_stride, exits, exits_stride, results, exit_index,
    CLASSES: tl.constexpr, CRITERION: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, THRESHOLD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """`answer` for a tile of ROWS entries whose logits are in `scratch`, PART entries at a time."""
    survives = tl.zeros([ROWS], tl.int32)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    for first in tl.range(0, ROWS, PART, num_stages=1):
        item = first + tl.arange(0, PART)
        entry = tile * ROWS + item
        alive = entry < count
        out = tl.load(
            scratch + entry[:, None].to(tl.int64) * (CLASSES + 1) + column,
            mask=alive[:, None] & (column <= CLASSES),
            other=0.0,
        )
        part = answer(
            out, entry, alive, threshold, rule, positions, logits, logits_row_stride, logits_column_stride,
            confidence, confidence_stride, exits, exits_stride, results, exit_index, CLASSES, CRITERION, BLOCK_COLUMNS,
            THRESHOLD_STRIDE,
        )  # fmt: skip
        survives += tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == item[None, :], part[None, :], 0), axis=1)
    return survives


@triton.jit
def advance(
    survives, entry, tile, rows, positions, size, next_rows, next_positions, next_live, workspace,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Place every entry of the tile in the next live list."""
    up_to = tl.cumsum(survives, axis=0)
    count = tl.sum(survives, axis=0)
    before = survivors_before(workspace + 2, tile, count, WINDOW)
    rank = before + up_to - survives
    # Survivors go to the front; the others, whose final number is not known yet, to the back in reverse order.
    target = tl.where(survives > 0, rank, size - 1 - (entry - rank))
    inside = entry < size
    tl.store(next_rows + target, tl.load(rows + entry, mask=inside, other=0), mask=inside)
    tl.store(next_positions + target, tl.load(positions + entry, mask=inside, other=0), mask=inside)

    tiles = tl.num_programs(0)
    if tile == tiles - 1:
        tl.store(next_live, before + count)
    # The last tile leaves the workspace as it was found, so that no launch needs another one to clear it.
    tl.debug_barrier()
    if tl.atomic_add(workspace + 1, 1) == tiles - 1:
        for start in range(0, tiles + 2, WINDOW):
            index = start + tl.arange(0, WINDOW)
            tl.store(workspace + index, index * 0, mask=index < tiles + 2)
