"""The order of samples: a pure function of (counts, seed, epoch), the same at every world size.

Positions count the run's samples: position p = e N + q is the q-th of epoch e. They are dealt out to a fixed number
L of lanes, lane(p) = p mod L. In each epoch the shards are permuted and put end to end on a ring, the ring is turned by
a random amount and cut into L contiguous slices, one a lane, each exactly as long as the lane has positions in this
epoch. A lane goes through its slice in blocks and shuffles inside each. So every sample has exactly one position an
epoch, whatever N, the batch and the world size; a rank owns lanes, reads few long ranges, and a change of world size
only hands lanes over.

Random numbers are raw Philox words at a counter made of (epoch, lane, block), sorted into permutations: unlike the
methods of numpy's Generator, these never change with numpy's version.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from scoreray.data.errors import UserError

MOST_LANES = 128
EPOCHS_KEPT = 4  # as many as a look-up and what is read ahead of it touch in a data set of a few batches
BLOCKS_KEPT = 256
BlockKey = tuple[int, int, int]  # epoch, lane, block
_SHARDS, _TURN, _BLOCK = 0, 1, 2  # what a stream of random words is for


@dataclass(frozen=True)
class RecordRange:
    """Neighbouring samples: `count` records of shard number `shard`, from its record `first` on."""

    shard: int
    first: int
    count: int


@dataclass(frozen=True)
class ShuffleBlock:
    """What a lane reads at once. `samples` int64 [n]: numbers in the manifest, as the lane hands them out.
    `slots` int64 [n]: where each is in `ranges` put end to end."""

    ranges: list[RecordRange]
    samples: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    permuted: np.ndarray  # shard numbers
    starts: np.ndarray  # [num_shards + 1] in the permuted order
    turn: int
    lane_start: np.ndarray  # [L + 1] where the lane's slice begins on the ring


class Order:
    """Order of `counts` samples (of each shard).

    Args:
      counts: samples of each shard.
      seed: of the run.
      num_lanes: fixed for the run; every world size must divide it.
      shuffle_block: samples that a lane shuffles at once.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, *, seed: int, num_lanes: int, shuffle_block: int) -> None:
        if num_lanes < 1 or shuffle_block < 1:
            raise UserError(f"num_lanes {num_lanes} and shuffle_block {shuffle_block} must be at least 1")
        self.counts = np.asarray(counts, np.int64)
        self.num_samples = int(self.counts.sum())
        self.seed, self.num_lanes, self.shuffle_block = seed, num_lanes, shuffle_block
        self._first_samples = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[BlockKey, ShuffleBlock] = OrderedDict()
        self._lock = threading.Lock()  # of both

    def __reduce__(self) -> tuple[partial[Order], tuple[()]]:
        """To another process without what it keeps, which the arguments give again."""
        options = {"seed": self.seed, "num_lanes": self.num_lanes, "shuffle_block": self.shuffle_block}
        return partial(Order, self.counts, **options), ()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, lane, block, place in the block) of each position, int64 [n] all."""
        positions = np.asarray(positions, np.int64)
        epoch, rest = np.divmod(positions, self.num_samples)
        lane = positions % self.num_lanes
        first = (lane - epoch * self.num_samples) % self.num_lanes  # of the lane in this epoch
        block, place = np.divmod((rest - first) // self.num_lanes + self._stagger(lane), self.shuffle_block)
        return epoch, lane, block, place - np.where(block == 0, self._stagger(lane), 0)

    def by_block(self, positions: np.ndarray) -> list[tuple[BlockKey, np.ndarray, np.ndarray]]:
        """The positions by their block: (block, rows of `positions`, places in the block)."""
        epoch, lane, block, place = self.locate(positions)
        rows = np.lexsort((block, epoch, lane))
        epoch, lane, block, place = epoch[rows], lane[rows], block[rows], place[rows]
        changes = (np.diff(lane) != 0) | (np.diff(epoch) != 0) | (np.diff(block) != 0)
        cuts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(rows)]
        return [((int(epoch[i]), int(lane[i]), int(block[i])), rows[i:j], place[i:j]) for i, j in pairwise(cuts)]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples' numbers in the manifest, int64 [n]."""
        found = np.empty(len(positions), np.int64)
        for key, rows, places in self.by_block(positions):
            found[rows] = self.block(*key).samples[places]
        return found

    def num_blocks(self, epoch: int, lane: int) -> int:
        """How many blocks the lane goes through in this epoch."""
        state = self._epoch(epoch)
        size = int(state.lane_start[lane + 1] - state.lane_start[lane])
        return -(-(size + self._stagger(lane)) // self.shuffle_block) if size else 0

    def block(self, epoch: int, lane: int, block: int) -> ShuffleBlock:
        key = (epoch, lane, block)
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        state = self._epoch(epoch)
        stagger = self._stagger(lane)
        size = int(state.lane_start[lane + 1] - state.lane_start[lane])
        start = max(0, block * self.shuffle_block - stagger)
        count = min((block + 1) * self.shuffle_block - stagger, size) - start
        if count <= 0:
            raise IndexError(f"lane {lane} has no block {block} in epoch {epoch}")
        ranges = self._ranges(state, int(state.lane_start[lane]) + start, count)
        numbers = np.concatenate(
            [np.arange(part.count) + part.first + self._first_samples[part.shard] for part in ranges]
        )
        slots = np.argsort(self._random(count, _BLOCK, epoch, lane, block), kind="stable")
        made = ShuffleBlock(ranges, numbers[slots], slots)
        with self._lock:
            self._blocks[key] = made
            if len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return made

    def _stagger(self, lane: Any) -> Any:
        """How much shorter a lane's first block is: spreads the lanes' reads over time."""
        return lane * self.shuffle_block // self.num_lanes % self.shuffle_block

    def _ranges(self, state: _Epoch, start: int, count: int) -> list[RecordRange]:
        """The samples [start, start + count) of the ring, as ranges of shards."""
        ranges = []
        while count:
            at = (start + state.turn) % self.num_samples
            k = int(np.searchsorted(state.starts, at, side="right")) - 1
            taken = min(count, int(state.starts[k + 1]) - at)
            ranges.append(RecordRange(int(state.permuted[k]), at - int(state.starts[k]), taken))
            start, count = start + taken, count - taken
        return ranges

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch in self._epochs:
                return self._epochs[epoch]
        permuted = np.argsort(self._random(len(self.counts), _SHARDS, epoch, 0, 0), kind="stable")
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts[permuted])])
        turn = int(self._random(1, _TURN, epoch, 0, 0)[0] % np.uint64(self.num_samples))
        lanes = np.arange(self.num_lanes, dtype=np.int64)
        first = (lanes - epoch * self.num_samples) % self.num_lanes  # the lane's first position, minus e N
        sizes = np.maximum(0, (self.num_samples - first + self.num_lanes - 1) // self.num_lanes)
        lane_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        made = _Epoch(permuted, starts, turn, lane_start)
        with self._lock:
            self._epochs[epoch] = made
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return made

    def _random(self, n: int, purpose: int, epoch: int, lane: int, block: int) -> np.ndarray:
        """n random words, uint64; a function of the arguments and the seed alone."""
        counter = [0, block, (lane << 8) + purpose, epoch]  # the low word counts the draws
        return np.random.Philox(counter=counter, key=[self.seed % (1 << 64), 0x5C0E]).random_raw(n)


def default_lanes(global_batch_size: int, world_sizes: Iterable[int] = (1,)) -> int:
    """The number of lanes for a run that may take any of `world_sizes`: of the divisors of the global batch up to
    MOST_LANES, the one with which most other world sizes could be taken too. Raises UserError if there is none."""
    needed = math.lcm(*world_sizes)
    if global_batch_size % needed:
        raise UserError(
            f"global_batch_size {global_batch_size} is not divisible by every world size that the run may take "
            f"({', '.join(map(str, sorted(world_sizes)))}); take a multiple of {needed}"
        )
    lower = [n for n in range(1, math.isqrt(global_batch_size) + 1) if global_batch_size % n == 0]
    divisors = sorted({*lower, *(global_batch_size // n for n in lower)})
    fitting = [n for n in divisors if n % needed == 0 and n <= max(MOST_LANES, needed)]
    return max(fitting, key=lambda n: (sum(n % d == 0 for d in divisors), n))
