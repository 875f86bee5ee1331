"""The store of responses: bounds, lines of responses, and deletion in the middle of one."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saddle.errors import InvalidRequest, NotFound
from saddle.server.responses_store import OVERHEAD_BYTES, ResponseStore, Stored, items_of


def stored(name: str, previous: str | None = None, size: int = 0, status: str = "completed") -> Stored:
    body = msgspec.json.encode({"id": name, "output": [{"said": name}], "pad": "x" * size})
    return Stored(name, status, body, msgspec.json.encode([{"asked": name}]), previous)


def line(store: ResponseStore, name: str) -> list[str]:
    return [each.id for each in store.line(store.get(name))]


def test_a_line_is_the_conversation() -> None:
    store = ResponseStore(1 << 20)
    assert all(store.put(each) for each in (stored("a"), stored("b", "a"), stored("c", "b"), stored("x", "a")))
    assert line(store, "c") == ["a", "b", "c"]
    assert items_of(store.conversation("x")) == [{"asked": "a"}, {"said": "a"}, {"asked": "x"}, {"said": "x"}]
    kept = line_of(store, "c", "x")
    assert store.num_bytes == sum(len(each.body) + len(each.items) + OVERHEAD_BYTES for each in kept)


def line_of(store: ResponseStore, *names: str) -> list[Stored]:
    return list({each.id: each for name in names for each in store.line(store.get(name))}.values())


def test_the_least_recently_used_goes_first_and_never_what_others_stand_on() -> None:
    store = ResponseStore(1 << 20, max_count=3)
    for each in (stored("a"), stored("b", "a"), stored("x")):
        store.put(each)
    store.get("b")
    store.put(stored("y"))
    assert len(store) == 3
    with pytest.raises(NotFound):
        store.get("x")
    assert line(store, "b") == ["a", "b"]
    store.put(stored("z"))  # of y, a and b the one used longest ago is y
    with pytest.raises(NotFound):
        store.get("y")
    store.put(stored("w"))  # then b, and a after it
    with pytest.raises(NotFound):
        store.get("b")
    assert line(store, "a") == ["a"]


def test_bytes_are_bounded() -> None:
    store = ResponseStore(3 * (OVERHEAD_BYTES + 200))
    for number in range(10):
        assert store.put(stored(str(number), size=100))
        assert store.num_bytes <= 3 * (OVERHEAD_BYTES + 200)
    assert len(store) == 3
    assert not store.put(stored("big", size=10_000))
    assert len(store) == 3, "what can never fit pushes nothing out"
    assert not ResponseStore(0).put(stored("a"))


def test_deleted_in_the_middle() -> None:
    store = ResponseStore(1 << 20)
    for each in (stored("a"), stored("b", "a"), stored("c", "b")):
        store.put(each)
    store.delete("b")
    for use in (store.get, store.delete, store.conversation):
        with pytest.raises(NotFound):
            use("b")
    assert line(store, "c") == ["a", "b", "c"], "others still stand on it"
    store.delete("c")
    assert len(store) == 1
    store.delete("a")
    assert (len(store), store.num_bytes) == (0, 0)


def test_what_cannot_be_continued() -> None:
    store = ResponseStore(1 << 20)
    store.put(stored("bad", status="failed"))
    store.put(stored("cut", status="incomplete"))
    with pytest.raises(InvalidRequest, match="failed and cannot be continued") as caught:
        store.conversation("bad")
    assert caught.value.param == "previous_response_id"
    assert len(items_of(store.conversation("cut"))) == 2
    with pytest.raises(NotFound, match="Send the whole conversation") as missing:
        store.conversation("gone")
    assert missing.value.param == "previous_response_id"


def test_one_that_was_forgotten_while_it_was_continued() -> None:
    store = ResponseStore(1 << 20)
    store.put(stored("b", "gone"))
    assert line(store, "b") == ["b"]


def test_what_it_stood_on_is_kept_when_that_is_deleted_meanwhile() -> None:
    """Else whoever goes on from there would get an answer that knows nothing of the beginning."""
    store = ResponseStore(1 << 20)
    for each in (stored("a"), stored("b", "a")):
        store.put(each)
    began = store.conversation("b")
    store.delete("b")
    store.delete("a")
    assert store.put(stored("c", "b"), began)
    assert line(store, "c") == ["c"]
    said = [{"asked": "a"}, {"said": "a"}, {"asked": "b"}, {"said": "b"}, {"asked": "c"}, {"said": "c"}]
    assert items_of(store.conversation("c")) == said
    assert store.num_bytes == sum(each.num_bytes for each in line_of(store, "c"))
    alone = stored("e", "d").num_bytes
    assert ResponseStore(alone).put(stored("e", "d"))
    assert not ResponseStore(alone).put(stored("e", "d"), began), "with what it stood on it does not fit"


STEPS = st.lists(st.tuples(st.sampled_from(["put", "get", "delete"]), st.integers(0, 11), st.integers(0, 11),
                           st.integers(0, 600)), max_size=60)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_any_use_keeps_the_books(steps: list[tuple[str, int, int, int]]) -> None:
    store = ResponseStore(6000, max_count=5)
    for number, (what, one, other, size) in enumerate(steps):
        name = f"{one}"
        if what == "put":
            store.put(stored(f"n{number}", f"n{other}", size))
        else:
            try:
                (store.get if what == "get" else store.delete)(f"n{name}")
            except NotFound:
                continue
        kept = list(store._kept.values())
        assert store.num_bytes == sum(each.num_bytes for each in kept) <= 6000
        assert len(store) <= 5
        order = [each.id for each in kept]
        for each in kept:
            assert each.num_next == sum(other.previous == each.id for other in kept)
            assert not each.hidden or each.num_next
            if each.previous is not None:
                assert order.index(each.previous) > order.index(each.id), "what others stand on is used after them"
