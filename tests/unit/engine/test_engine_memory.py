"""Blocks and the prefix cache, without a scheduler."""

from __future__ import annotations

import pytest
from engine_support import request

from saddle.engine.block_pool import BlockPool
from saddle.engine.kv_cache import KVCache
from saddle.engine.request import Request, from_tokens


def made(prompt: list[int], salt: str | None = None, **params: object) -> Request:
    return from_tokens(request("r", prompt, salt=salt, **params), (0, 0.0, 0), frozenset({1}), 100, seed=1)


def cached(pool: BlockPool, *names: str) -> list[int]:
    """A sequence of blocks, published under these names and released."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        assert pool.publish(block, name.encode())
    pool.release(blocks)
    return blocks


def test_a_block_is_free_cached_or_used() -> None:
    pool = BlockPool(4)
    used = pool.allocate(1)
    cached(pool, "a", "b")
    assert (pool.num_free, pool.num_cached, pool.num_available) == (1, 2, 3)
    pool.check([used])
    pool.release(used)
    assert (pool.num_free, pool.num_cached) == (2, 2)
    pool.check([])


def test_free_blocks_go_before_cached_ones_and_deep_ones_are_evicted_first() -> None:
    pool = BlockPool(4)
    first, second, third = cached(pool, "a", "b", "c")
    (fresh,) = pool.allocate(1)
    assert fresh not in (first, second, third)
    assert pool.allocate(2) == [third, second]
    assert pool.lookup(b"a") == first
    assert pool.lookup(b"b") is None


def test_eviction_follows_the_last_use() -> None:
    pool = BlockPool(2)
    (old,) = cached(pool, "old")
    (new,) = cached(pool, "new")
    pool.share([old])
    pool.release([old])
    assert pool.allocate(1) == [new]
    assert pool.lookup(b"old") == old


def test_a_shared_block_is_freed_by_its_last_user() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert pool.publish(blocks[0], b"x")
    pool.share(blocks)
    pool.release(blocks)
    assert (pool.num_cached, pool.num_idle(blocks)) == (0, 0)
    pool.check([blocks])
    pool.release(blocks)
    assert (pool.num_cached, pool.num_idle(blocks)) == (1, 1)


def test_more_blocks_than_there_are() -> None:
    pool = BlockPool(2)
    with pytest.raises(IndexError, match="3 blocks wanted, 2 available"):
        pool.allocate(3)
    pool.check([])


def test_the_first_block_of_a_content_stays_the_known_one() -> None:
    pool = BlockPool(2)
    one, two = pool.allocate(2)
    assert pool.publish(one, b"x")
    assert not pool.publish(two, b"x")
    assert pool.lookup(b"x") == one
    pool.release([two])
    assert pool.num_free == 1


def test_unpublished_blocks_are_not_found_and_keep_their_users() -> None:
    pool = BlockPool(3)
    idle = cached(pool, "idle")
    used = pool.allocate(1)
    pool.publish(used[0], b"used")
    pool.unpublish([*idle, *used])
    assert pool.lookup(b"idle") is pool.lookup(b"used") is None
    assert (pool.num_free, pool.num_cached) == (2, 0)
    pool.check([used])


def test_forget_leaves_what_is_in_use() -> None:
    pool = BlockPool(3)
    cached(pool, "idle")
    used = pool.allocate(1)
    pool.publish(used[0], b"used")
    pool.forget()
    assert pool.lookup(b"idle") is None
    assert pool.lookup(b"used") == used[0]
    assert pool.num_free == 2


@pytest.mark.parametrize("tables", [[], [[0], [0]], [[0, 0]], [[1]]])
def test_check_finds_wrong_users(tables: list[list[int]]) -> None:
    pool = BlockPool(3)
    assert pool.allocate(1) == [0]
    pool.check([[0]])
    with pytest.raises(AssertionError):
        pool.check(tables)


def test_check_finds_a_lost_block() -> None:
    pool = BlockPool(3)
    pool._free.pop()
    with pytest.raises(AssertionError, match="2 free \\+ 0 cached \\+ 0 used != 3"):
        pool.check([])


# ---------------------------------------------------------------------------------------------------------------


def fill(kv: KVCache, owner: Request, num_tokens: int) -> list[int]:
    """Compute tokens of a request, as a plan would."""
    kv.extend(owner, [], kv.num_blocks_of(num_tokens) - len(owner.block_ids))
    owner.num_computed = num_tokens
    return kv.publish(owner, num_tokens)


def test_a_prefix_is_found_block_by_block() -> None:
    kv = KVCache(16, 4)
    first = made([5, 6, 7, 8, 9, 10, 11, 12, 13])
    blocks = fill(kv, first, 9)
    assert len(blocks) == 2
    assert kv.match(made([5, 6, 7, 8, 9, 10, 11, 12, 99])) == blocks
    assert kv.match(made([5, 6, 7, 8, 0, 10, 11, 12, 99])) == blocks[:1]
    assert kv.match(made([0, 6, 7, 8, 9, 10, 11, 12, 99])) == []


def test_a_block_is_found_only_behind_the_same_tokens() -> None:
    kv = KVCache(16, 4)
    fill(kv, made([5, 5, 5, 5, 7, 7, 7, 7]), 8)
    assert kv.match(made([7, 7, 7, 7, 7])) == []


def test_the_last_token_is_never_cached() -> None:
    kv = KVCache(16, 4)
    blocks = fill(kv, made(list(range(2, 10))), 8)
    assert kv.match(made(list(range(2, 10)))) == blocks[:1]
    assert kv.match(made(list(range(2, 11)))) == blocks


def test_another_salt_finds_nothing() -> None:
    kv = KVCache(16, 4)
    prompt = list(range(2, 11))
    fill(kv, made(prompt, salt="mine"), 9)
    assert kv.match(made(prompt, salt="yours")) == []
    assert kv.match(made(prompt)) == []
    assert len(kv.match(made(prompt, salt="mine"))) == 2


def test_who_wants_prompt_logprobs_computes_all_but_shares_it() -> None:
    kv = KVCache(16, 4)
    prompt = list(range(2, 11))
    fill(kv, made(prompt, prompt_logprobs=0), 9)
    assert kv.match(made(prompt, prompt_logprobs=0)) == []
    assert len(kv.match(made(prompt))) == 2


def test_without_caching_nothing_is_published_or_found() -> None:
    kv = KVCache(16, 4, enable_prefix_caching=False)
    prompt = list(range(2, 11))
    assert fill(kv, made(prompt), 9) == []
    assert kv.match(made(prompt)) == []


def test_a_lookup_inside_a_prompt_continues_at_a_block() -> None:
    kv = KVCache(16, 4)
    prompt = list(range(2, 16))
    ahead, behind = made(prompt), made(prompt)
    fill(kv, behind, 4)
    blocks = fill(kv, ahead, 14)
    assert kv.match(behind) == blocks[0:2]  # the first of its own was published by `behind`
    behind.num_computed = 5
    assert kv.match(behind) == []


def test_hits_and_queries_are_counted_in_tokens_once_a_request() -> None:
    kv = KVCache(16, 4)
    prompt = list(range(2, 15))
    fill(kv, made(prompt), 13)
    reader = made(prompt)
    blocks = kv.match(reader)
    kv.count(reader, blocks[:2])
    kv.extend(reader, blocks[:2], 0)
    kv.count(reader, blocks[2:])
    assert (kv.num_queries, kv.num_hits, reader.num_cached_tokens) == (13, 12, 12)
    reader.was_preempted = True
    kv.count(reader, blocks)
    assert (kv.num_queries, kv.num_hits) == (13, 12)


def test_sharing_what_is_idle_leaves_less_room() -> None:
    kv = KVCache(6, 4)
    owner = made(list(range(2, 14)))
    fill(kv, owner, 12)
    reader = made(list(range(2, 15)))
    blocks = kv.match(reader)
    assert kv.room(blocks) == 3
    kv.free(owner)
    assert kv.room(blocks) == 3
    assert kv.room([]) == 6
