"""A batch sampler that follows the quorum: each sample of a committed step counts once, whoever comes or dies."""

import collections
from collections.abc import Iterator, Sized
from typing import Any

import torch
import xxhash

from everstep.config import check_count
from everstep.errors import ConfigError
from everstep.train.header import Contribution
from everstep.train.manager import Manager
from everstep.train.sample_stream import Block, SampleStream, slots_of
from everstep.train.stepper import Decision

_DIGEST_MASK = (1 << 63) - 1


class DistributedSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of dataset indices for this member, a function of `seed` and the samples committed so far.

        sampler = es.DistributedSampler(manager, dataset, batch_size=32)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
        for inputs, targets in sampler.batches(loader):
            ...

    An aborted step's samples are drawn again, and so are those of a member that died. Several batches a step (gradient
    accumulation) are fine. An epoch ends on every member after the same step; samples beyond its end that the last
    step took are the first of the next epoch. Joiners take the position over from a peer.

    In a replica group of several ranks each rank draws samples of its own. Where some of them need the same ones (they
    hold parts of one model: tensor or pipeline parallelism), `shard=(i, n)` says that this rank draws the i-th of n
    shares of its group's; `(0, 1)` on every rank: all draw the same.

    `batches` drops what the loader's workers fetched ahead for another membership. All of it belongs to the training
    thread. Every group needs the same `batch_size`, `seed` and dataset length.
    """

    def __init__(
        self,
        manager: Manager,
        dataset: Sized,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        shard: tuple[int, int] | None = None,
    ) -> None:
        check_count("batch_size", batch_size, 1, 1 << 30)
        check_count("seed", seed, 0, 1 << 62)
        if len(dataset) == 0:
            raise ConfigError("the dataset is empty")
        if shard is not None:
            check_count("the number of shards", shard[1], 1, 1 << 20)
            check_count("shard", shard[0], 0, shard[1] - 1)
        self._manager = manager
        self._length = len(dataset)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._given_shard = shard
        self._stream = SampleStream()
        self._contributors: list[str] = []  # of the last committed step
        self._epoch = 0
        self._slot = 0
        self._slots = 1
        self._used: list[Block] = []  # given to the script in the step under way
        self._ahead: collections.deque[Block] = collections.deque()  # drawn for the loader, not yet given
        self._stale = 0  # how many of `_ahead`, the oldest, were drawn for a step that came otherwise
        self._orders: dict[int, torch.Tensor] = {}
        self._is_wrapped = False
        manager.set_samples(self)
        manager.register_state_dict_fn("sampler", self.load_state_dict, self.state_dict)

    # ---- for the script

    def batches(self, loader: Any) -> Iterator[Any]:
        """The loader's batches that are this member's to train on, until the epoch ends."""
        if getattr(loader, "batch_sampler", None) is not self:
            raise ConfigError("batches() takes a DataLoader made with batch_sampler=this sampler")
        self._is_wrapped = True
        self._ahead.clear()
        self._stale = 0
        try:
            for batch in loader:
                if self._accept():
                    yield batch
        finally:
            self._is_wrapped = False

    def set_epoch(self, epoch: int) -> None:
        """Iterate until the end of this epoch; one that lies ahead is skipped to."""
        check_count("epoch", epoch, 0, 1 << 40)
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """For the DataLoader: ends when the epoch's samples are drawn."""
        if not self._is_wrapped:
            raise ConfigError("iterate over sampler.batches(loader): the loader itself may fetch for other members")
        while True:
            self._manager.start_step()
            self._stream.skip_to(self._epoch * self._length)
            self._find_slot()
            ahead = len(self._ahead) - self._stale
            block = self._stream.block((len(self._used) + ahead) * self._slots + self._slot, self._batch_size)
            if self._first_of_step(len(self._used) + ahead) >= (self._epoch + 1) * self._length:
                if not ahead:
                    return
                # The workers are ahead of the last steps: whether the epoch ends here shows when those are decided.
                block = Block(-1, block.positions)
            self._ahead.append(block)
            yield [self._index(position) for position in block.positions]

    def __len__(self) -> int:
        """Batches left in the epoch for this member, if the quorum stays as it is."""
        left = max(0, (self._epoch + 1) * self._length - self._stream.first_uncommitted)
        return -(-left // (self._batch_size * max(1, self._slots)))

    def state_dict(self) -> dict[str, object]:
        return {
            "seed": self._seed,
            "cursor": self._stream.cursor,
            "holes": list(self._stream.holes),
            "contributors": list(self._contributors),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self._seed:
            raise ConfigError(f"this sampler has seed={self._seed}, the state was made with seed={state['seed']}")
        self._stream.cursor = state["cursor"]
        self._stream.holes = list(state["holes"])
        self._contributors = list(state["contributors"])
        self._forget_ahead()

    # ---- for the manager

    def contribution(self) -> Contribution:
        if not self._used:
            return Contribution()
        ids = b"".join(position.to_bytes(8, "little") for block in self._used for position in block.positions)
        return Contribution(
            samples=len(self._used) * self._batch_size,
            digest=xxhash.xxh3_64_intdigest(ids) & _DIGEST_MASK,
            slot=self._slot,
            slots=self._slots,
            draws=len(self._used),
            batch_size=self._batch_size,
        )

    def check(self, contributions: tuple[Contribution, ...]) -> str:
        """Why these contributions must not count together, or ""."""
        drawing = [c for c in contributions if c.slots]
        if len({c.batch_size for c in drawing}) > 1:
            sizes = sorted({c.batch_size for c in drawing})
            return f"replica groups draw batches of different sizes {sizes}; give all the same batch_size"
        if len({c.slots for c in drawing}) > 1 or len({c.slot for c in drawing}) < len(drawing):
            return "members drew overlapping samples while the quorum changed; they draw again"
        return ""

    def step_decided(self, decision: Decision) -> None:
        if decision.committed:
            shard, shards = self._shard
            drawing = [c for c in decision.contributions.values() if c.slots]
            # The other ranks of each group drew as often as this one: the group has checked that before it voted.
            numbers = [
                draw * c.slots + c.slot - shard + other
                for c in drawing
                for draw in range(c.draws)
                for other in range(shards)
            ]
            self._stream.commit(numbers, self._batch_size)
            self._contributors = [str(member) for member in decision.contributions]
        self._used.clear()
        if self._ahead and not self._is_current(self._ahead[self._stale] if self._stale < len(self._ahead) else None):
            self._forget_ahead()

    # ---- drawing

    def _accept(self) -> bool:
        """The loader hands out the oldest block: is it still the one that this member takes now?"""
        self._manager.start_step()
        block = self._ahead.popleft()
        if self._stale:
            self._stale -= 1
            return False
        if not self._is_current(block):
            self._forget_ahead()
            return False
        self._used.append(block)
        return True

    def _is_current(self, block: Block | None) -> bool:
        if block is None:
            return False
        self._find_slot()
        if self._first_of_step(len(self._used)) >= (self._epoch + 1) * self._length:
            return False
        expected = self._stream.block(len(self._used) * self._slots + self._slot, self._batch_size)
        return block.number >= 0 and block.positions == expected.positions

    def _first_of_step(self, draw: int) -> int:
        """The first position that all members' draw `draw` takes: all agree on whether the epoch has ended."""
        return self._stream.block(draw * self._slots, self._batch_size).positions[0]

    def _find_slot(self) -> None:
        members, me = self._manager.members()
        slots = slots_of(self._contributors, members)
        shard, shards = self._shard
        if me in slots:  # else it was left out a moment ago: what it draws now belongs to a step that it has no part in
            self._slot, self._slots = slots.index(me) * shards + shard, len(slots) * shards

    @property
    def _shard(self) -> tuple[int, int]:
        return self._given_shard if self._given_shard is not None else self._manager.group_place()

    def _forget_ahead(self) -> None:
        self._stale = len(self._ahead)

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self._length)
        if not self._shuffle:
            return offset
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = torch.randperm(self._length, generator=generator)
        return int(self._orders[epoch][offset])
