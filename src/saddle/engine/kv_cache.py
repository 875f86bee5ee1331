"""KV memory of requests: the block table of each one, and the prefix cache between them.

A full block is known by the hash of everything up to its end: hash(parent's hash, its ids), the root being the
request's salt. So a block is found only behind the very same tokens, and only by requests with the same salt.
"""

from __future__ import annotations

import hashlib
from array import array

from saddle.engine.block_pool import BlockPool
from saddle.engine.request import Request

HASH_BYTES = 32
HASH_AHEAD = 64


class KVCache:
    """Allocates, finds and gives back blocks, on behalf of requests.

    Attributes:
        num_queries: prompt tokens that were looked up, each request once.
        num_hits: those of them that were found.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.num_queries = 0
        self.num_hits = 0
        self._enabled = enable_prefix_caching

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, request: Request) -> list[int]:
        """Cached blocks that continue the request's table; nothing is taken.

        At least the last known token stays to be computed. A request in the middle of a block finds nothing.
        """
        first, offset = divmod(request.num_computed, self.block_size)
        if offset or not self._enabled or not request.reads_cache:
            return []
        last = (len(request.token_ids) - 1) // self.block_size
        found = []
        for index in range(first, last):
            block = self.pool.lookup(self._hash(request, index))
            if block is None:
                break
            found.append(block)
        return found

    def room(self, cached: list[int]) -> int:
        """Blocks that can be allocated once `cached`, from `match`, are shared."""
        return self.pool.num_available - self.pool.num_idle(cached)

    def extend(self, request: Request, cached: list[int], num_new: int) -> list[int]:
        """Append shared blocks and `num_new` fresh ones to the request's table. Returns the fresh ones."""
        self.pool.share(cached)
        fresh = self.pool.allocate(num_new)
        request.block_ids += cached
        request.block_ids += fresh
        return fresh

    def count(self, request: Request, cached: list[int]) -> None:
        """Count a lookup whose blocks were taken; after a preemption a request finds its own: that is no hit."""
        if not self._enabled or not request.reads_cache or request.was_preempted:
            return
        if not request.block_ids:
            self.num_queries += request.num_prompt
        num_tokens = len(cached) * self.block_size
        self.num_hits += num_tokens
        request.num_cached_tokens += num_tokens

    def publish(self, request: Request, num_tokens: int) -> list[int]:
        """Offer the full blocks of the first `num_tokens` tokens to the cache. Returns the blocks newly published.

        The ids of these tokens are known, and a plan that computes them was issued.
        """
        published: list[int] = []
        last = num_tokens // self.block_size
        if self._enabled:
            for index in range(request.num_published, last):
                block = request.block_ids[index]
                if self.pool.publish(block, self._hash(request, index)):
                    published.append(block)
        request.num_published = max(request.num_published, last)
        return published

    def unpublish(self, block_ids: list[int]) -> None:
        """Forget the content of blocks that a failed step may have left wrong."""
        self.pool.unpublish(block_ids)

    def free(self, request: Request) -> None:
        """Take row and blocks from a request; its published blocks stay findable until they are evicted."""
        self.pool.release(request.block_ids)
        request.leave_row()

    def _hash(self, request: Request, index: int) -> bytes:
        """Hash of the request's tokens up to the end of block `index`, whose ids are known."""
        hashes, size = request.block_hashes, self.block_size
        if index < len(hashes):
            return hashes[index]
        # Some more than asked for: packing many ids at once is what makes long prompts cheap.
        last = min(index + HASH_AHEAD, len(request.token_ids) // size)
        packed = array("I", request.token_ids[len(hashes) * size : last * size])
        data, width = packed.tobytes(), size * packed.itemsize
        parent = hashes[-1] if hashes else root_hash(request.cache_salt)
        for start in range(0, len(data), width):
            parent = hashlib.blake2b(parent + data[start : start + width], digest_size=HASH_BYTES).digest()
            hashes.append(parent)
        return hashes[index]


def root_hash(cache_salt: str | None) -> bytes:
    """The parent of a request's first block."""
    if cache_salt is None:
        return bytes(HASH_BYTES)
    return hashlib.blake2b(cache_salt.encode(), digest_size=HASH_BYTES, person=b"salt").digest()
