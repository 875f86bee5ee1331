"""A fixed pool of KV blocks. Every block is in exactly one of three states:

    free     no user, content forgotten
    cached   no user, content known by its hash: found by `lookup`, or evicted when free blocks run out
    used     one user or more; its content may be known by a hash as well

and free + cached + used == total, always (`check`). Cached blocks are evicted in the order in which they lost their
last user, and the blocks of one sequence deepest first: a prefix is of use to more requests than what follows it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Who uses which block, and which content is where."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # next to be evicted first
        self._num_users = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    def num_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these cached blocks have no user: sharing them takes as many from `num_available`."""
        users = self._num_users
        return sum(users[block] == 0 for block in block_ids)

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks with one user each and no content; cached ones are evicted once nothing is free.

        Raises:
            IndexError: fewer than `num_blocks` are available; the caller looks first.
        """
        if num_blocks > self.num_available:
            raise IndexError(f"{num_blocks} blocks wanted, {self.num_available} available")
        taken = []
        for _ in range(num_blocks):
            block = self._free.pop() if self._free else self._evict()
            self._num_users[block] = 1
            taken.append(block)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more user for blocks that `lookup` found."""
        for block in block_ids:
            if self._num_users[block] == 0:
                del self._cached[block]
            self._num_users[block] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One user less for the blocks of a sequence, given in its order."""
        for block in reversed(block_ids):
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def lookup(self, content: bytes) -> int | None:
        """The block that holds this content."""
        return self._block_of.get(content)

    def publish(self, block: int, content: bytes) -> bool:
        """Make a used block findable by its content's hash; false if another block holds the same already."""
        if content in self._block_of or self._hash_of[block] is not None:
            return False
        self._block_of[content] = block
        self._hash_of[block] = content
        return True

    def unpublish(self, block_ids: Iterable[int]) -> None:
        """Forget the content of blocks; their users keep them."""
        for block in block_ids:
            content = self._hash_of[block]
            if content is None:
                continue
            del self._block_of[content]
            self._hash_of[block] = None
            if self._num_users[block] == 0:
                del self._cached[block]
                self._free.append(block)

    def forget(self) -> None:
        """Forget the content of every block that nobody uses."""
        self.unpublish(list(self._cached))

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every block is in one state and the users are those of `tables`."""
        users = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a block twice in one table: {table}"
            for block in table:
                users[block] += 1
        assert users == self._num_users, "users of blocks differ from the block tables"
        num_used = sum(count > 0 for count in users)
        assert self.num_free + self.num_cached + num_used == self.num_blocks, (
            f"{self.num_free} free + {self.num_cached} cached + {num_used} used != {self.num_blocks}"
        )
        idle = sorted([*self._free, *self._cached])
        assert idle == [block for block, count in enumerate(users) if count == 0], "a block in two states or none"
        assert all(self._hash_of[block] is None for block in self._free), "a free block has content"
        assert all(self._hash_of[block] is not None for block in self._cached), "a cached block has no content"
        known = {content: block for block, content in enumerate(self._hash_of) if content is not None}
        assert known == self._block_of, "hashes and blocks disagree"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        content = self._hash_of[block]
        assert content is not None
        del self._block_of[content]
        self._hash_of[block] = None
        return block
