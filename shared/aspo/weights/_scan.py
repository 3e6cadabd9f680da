"""Compiled loops of the weight-delta codec: find changes, write them as bytes, read them back, apply them.

They work on flat arrays of codes, the bits of a tensor's elements as uint8, 16, 32 or 64, and release the
interpreter lock. None checks the bounds of what it reads or writes; `find_unsound` says whether what came
from outside is sound, so it goes first. Compiled at first use, for each width; plain indexes keep that to a
second (slices and array expressions take the compiler twice as long).
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint64  # type: ignore[import-untyped]

ESCAPE = 255  # a gap byte: go on 255 further
WIDE = 15  # half a step byte: the step is in the planes
BLOCK = 4096  # elements compared at once: their mask stays in the L1 cache
_LANES = 8  # mask bytes in a word


@njit(nogil=True)
def pack_changes(old, new, mask, words, hits, where, gaps, steps, planes):  # type: ignore[no-untyped-def]
    """Write where and by how much `new` differs from `old`; returns (changed, gap bytes, escaped).

    A gap counts the equal elements before a change, a step is the modular difference in zigzag order. Steps
    lie two in a byte, the first in the low half; those of WIDE or more go to `planes` [width, n], least
    significant byte first. `gaps` has room for n + n // 255 bytes, `steps` for (n + 1) // 2. The others are
    scratch: `mask` [BLOCK] and `words` [BLOCK / 8] are one memory, `hits` and `where` have 8 places to spare.
    """
    wide = uint64(WIDE)
    width = planes.shape[0]
    sign = uint64(8 * width - 1)
    full = (uint64(2) << sign) - uint64(1)
    changed, gap_bytes, escaped, following = 0, 0, 0, 0
    for start in range(0, old.size, BLOCK):
        size = min(BLOCK, old.size - start)
        old_block, new_block = old[start : start + size], new[start : start + size]
        for i in range(size):  # in vectors; by indexes of `old` that the compiler cannot bound, it is not
            mask[i] = old_block[i] != new_block[i]
        for at in range(_find(mask, size, words, hits, where)):
            i = start + where[at]
            gap = i - following
            following = i + 1
            while gap >= ESCAPE:
                gaps[gap_bytes] = ESCAPE
                gap_bytes += 1
                gap -= ESCAPE
            gaps[gap_bytes] = gap
            gap_bytes += 1
            step = (uint64(new[i]) - uint64(old[i])) & full
            code = ((step << uint64(1)) ^ (uint64(0) - (step >> sign))) & full
            if changed % 2 == 0:
                steps[changed // 2] = min(code, wide)
            else:
                steps[changed // 2] |= min(code, wide) << uint64(4)
            changed += 1
            if code >= wide:
                for plane in range(width):
                    planes[plane, escaped] = (code >> uint64(8 * plane)) & uint64(255)
                escaped += 1
    return changed, gap_bytes, escaped


@njit(nogil=True)
def find_unsound(start, stop, lengths, table, ends, gaps, steps):  # type: ignore[no-untyped-def]
    """The first of segments `start` to `stop` whose gaps and steps do not fit its counts or length, or -1.

    Row i of `table` has the counts of segment i (changes, gap bytes, escaped steps, step bytes) and row i of
    `ends` their running sums.
    """
    for i in range(start, stop):
        changed, escaped, covered = table[i, 0], table[i, 2], table[i, 0]
        for at in range(ends[i, 1] - table[i, 1], ends[i, 1]):
            changed -= gaps[at] != ESCAPE
            covered += gaps[at]
        first_step = 2 * (ends[i, 3] - table[i, 3])
        for at in range(first_step, first_step + table[i, 0]):
            escaped -= _step(steps, at) == WIDE
        dangling = table[i, 1] > 0 and gaps[ends[i, 1] - 1] == ESCAPE
        if changed != 0 or escaped != 0 or covered > lengths[i] or dangling:
            return i
    return -1


@njit(nogil=True)
def add_changes(codes, first, gaps, steps, planes, positions, values):  # type: ignore[no-untyped-def]
    """Add a sound segment's steps to its codes; `positions` (plus `first`) and `values` receive what is new.

    First all positions, then the codes, so that cache misses overlap. No branch depends on the gaps: what an
    escape writes the next gap overwrites, and a sound segment does not end in an escape.
    """
    done, escaped, at = 0, 0, np.int64(0)
    for i in range(gaps.size):
        gap = np.int64(gaps[i])
        at += gap
        taken = gap != ESCAPE
        positions[uint64(done)] = at
        done += taken
        at += taken
    for i in range(done):
        code = uint64(_step(steps, i))
        if code == uint64(WIDE):
            code = uint64(0)
            for plane in range(codes.itemsize):
                code |= uint64(planes[plane, escaped]) << uint64(8 * plane)
            escaped += 1
        at = positions[uint64(i)]
        value = uint64(codes[uint64(at)]) + ((code >> uint64(1)) ^ (uint64(0) - (code & uint64(1))))
        codes[uint64(at)] = value
        values[uint64(i)] = value
        positions[uint64(i)] = first + at


@njit(nogil=True)
def _step(steps, i):  # type: ignore[no-untyped-def]
    i = uint64(i)
    return (steps[i >> uint64(1)] >> (uint64(4) * (i & uint64(1)))) & WIDE


@njit(nogil=True)
def _find(mask, size, words, hits, where):  # type: ignore[no-untyped-def]
    """Write to `where` the indexes of the ones among the first `size` bytes of `mask`; returns how many.

    Stores at every turn and advances on a hit, so that no branch depends on the data.
    """
    for i in range(size, mask.size):
        mask[i] = 0
    hit = 0
    for i in range(words.size):
        hits[hit] = i
        hit += words[i] != 0
    found = 0
    for h in range(hit):
        for lane in range(_LANES):
            i = uint64(hits[h]) * uint64(_LANES) + uint64(lane)
            where[found] = i
            found += mask[i]
    return found
