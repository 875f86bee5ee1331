"""The responses API over HTTP with a scripted engine: what is asked of it, what is kept, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from saddle.config import ServerConfig
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import EngineReady, TokenDelta, TokenRequest
from tests.unit.server.harness import Harness, Script, running, until, words

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "write", "description": "Write a file.", "strict": False,
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}  # fmt: skip
CALL = ["Hm", "</think>", "\n\n\n", "<minimax:tool_call>\n", '<invoke name="write">\n<parameter name="path">/a',
        "/b</parameter>\n</invoke>\n", "</minimax:tool_call>"]  # fmt: skip


def config(**fields: Any) -> ServerConfig:
    return ServerConfig(host="127.0.0.1", port=0, access_log=False, **fields)


def hanging(tokenizer: Tokenizer, *pieces: str) -> Script:
    """Says the pieces and never ends."""

    def script(request: TokenRequest) -> Iterable[TokenDelta]:
        for piece in pieces:
            yield TokenDelta(request_id=request.request_id, token_ids=tokenizer.encode(piece))

    return script


def long_context(server: Harness) -> None:
    server.client.state.ready = EngineReady(8192, 16, 64, server.tokenizer.vocab_size)


def prompt_of(server: Harness, number: int = -1) -> str:
    return server.tokenizer.decode(list(server.client.requests[number].prompt_ids), skip_special_tokens=False)


async def frames(server: Harness, body: dict[str, Any]) -> list[dict[str, Any]]:
    return parsed(await server.frames(PATH, body))


def parsed(frames: list[str]) -> list[dict[str, Any]]:
    found = [json.loads(frame.split("\ndata: ")[1]) for frame in frames if not frame.startswith(":")]
    numbers = [frame["sequence_number"] for frame in found]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return found


async def delete(server: Harness, path: str) -> tuple[int, Any]:
    async with server.http.delete(server.base + path) as reply:
        return reply.status, await reply.json()


async def test_everything_that_is_said_about_a_response(tokenizer: Tokenizer) -> None:
    body = {"model": "alias", "input": "hi", "instructions": "Be short.", "max_output_tokens": 50, "temperature": 0.5,
            "top_p": 0.9, "metadata": {"a": "b"}, "user": "me", "prompt_cache_key": "k", "safety_identifier": "s",
            "service_tier": "auto", "reasoning": {"effort": "high"}, "text": {"format": {"type": "text"}},
            "include": ["reasoning.encrypted_content", "web_search_call.action.sources"], "max_tool_calls": 3,
            "truncation": "disabled", "parallel_tool_calls": True, "tools": [TOOL], "tool_choice": "auto"}  # fmt: skip
    async with running(tokenizer, words(tokenizer, "Hm", "</think>", "\n\nYes")) as server:
        status, reply = await server.post(PATH, body)
        params = server.client.requests[0].params
        prompt = prompt_of(server)
    assert status == 200
    assert reply["id"].startswith("resp_")
    assert (params.max_tokens, params.temperature, params.top_p) == (50, 0.5, 0.9)
    assert "Be short." in prompt
    assert '"name": "write"' in prompt
    assert "strict" not in prompt
    for name in ("max_output_tokens", "temperature", "top_p", "metadata", "user", "prompt_cache_key", "max_tool_calls",
                 "safety_identifier", "instructions", "truncation", "parallel_tool_calls", "tool_choice"):  # fmt: skip
        assert reply[name] == body[name], name
    assert (reply["model"], reply["object"], reply["status"]) == ("alias", "response", "completed")
    assert reply["store"] is True
    assert reply["tools"] == [TOOL]
    assert reply["reasoning"] == {"effort": "high", "summary": None}
    assert reply["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert [item["type"] for item in reply["output"]] == ["reasoning", "message"]
    assert reply["output"][0]["encrypted_content"].startswith("saddle1.")
    assert reply["output"][1]["content"][0]["text"] == "Yes"
    assert reply["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert reply["usage"]["total_tokens"] == reply["usage"]["input_tokens"] + reply["usage"]["output_tokens"]
    assert "ignored" not in reply


async def test_what_reaches_the_engine(tokenizer: Tokenizer) -> None:
    body = {"input": "hi", "reasoning": {"effort": "none"}, "cache_salt": "salt", "priority": 3, "seed": 7, "top_k": 5,
            "stop": "END", "min_p": 0.1}  # fmt: skip
    defaults = {"temperature": 0.7, "top_p": 0.8}
    async with running(tokenizer, words(tokenizer, "x"), defaults=defaults) as server:
        status, reply = await server.post(PATH, body)
        (request,) = server.client.requests
    assert status == 200
    assert (request.cache_salt, request.priority) == ("salt", 3)
    assert request.grammar is not None
    assert (request.grammar.max_thinking_tokens, request.grammar.after_token_id) == (0, tokenizer.end_think_id)
    params = request.params
    assert (params.seed, params.top_k, params.stop, params.min_p) == (7, 5, ("END",), 0.1)
    assert (reply["temperature"], reply["top_p"]) == (params.temperature, params.top_p) == (0.7, 0.8)


async def test_stream_ends_with_the_response_that_is_kept(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, *CALL)) as server:
        told = await frames(server, {"input": "hi", "tools": [TOOL]})
        _, whole = await server.post(PATH, {"input": "hi", "tools": [TOOL]})
        _, kept = await server.get(f"{PATH}/{told[-1]['response']['id']}")
    assert told[-1]["type"] == "response.completed"
    assert told[-1]["response"] == json.loads(kept)
    arguments = "".join(f["delta"] for f in told if f["type"] == "response.function_call_arguments.delta")
    assert json.loads(arguments) == {"path": "/a/b"}

    def plain(response: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: value for key, value in item.items() if key not in ("id", "call_id")}
                for item in response["output"]]  # fmt: skip

    assert plain(told[-1]["response"]) == plain(whole)


async def test_going_on_from_a_response(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, *CALL)) as server:
        long_context(server)
        _, first = await server.post(PATH, {"input": "go", "instructions": "FIRST", "tools": [TOOL]})
        result = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "written"}
        again = {"input": [result], "previous_response_id": first["id"], "tools": [TOOL]}
        _, second = await server.post(PATH, again)
        assert "FIRST" not in prompt_of(server), "instructions are of one response alone"
        _, with_it = await server.post(PATH, {**again, "instructions": "FIRST"})
        prompts = [server.client.requests[n].prompt_ids for n in (0, 2)]
        items = [{"role": "user", "content": "go"}, *first["output"], result]
        await server.post(PATH, {"input": items, "instructions": "FIRST", "tools": [TOOL], "store": False})
        sent_back = server.client.requests[3].prompt_ids
        _, listed = await server.get(f"{PATH}/{second['id']}/input_items?order=asc")
        _, newest = await server.get(f"{PATH}/{second['id']}/input_items?limit=1")
    whole = [*prompts[0], *tokenizer.encode("".join(CALL)), tokenizer.eos_id]
    assert prompts[1][: len(whole)] == whole, "the prompt goes on where the model stopped"
    assert sent_back == prompts[1], "whoever keeps the items, the prompt is the same"
    assert second["previous_response_id"] == with_it["previous_response_id"] == first["id"]
    data = json.loads(listed)["data"]
    assert [item["type"] for item in data] == ["message", "reasoning", "function_call", "function_call_output"]
    assert all(item["id"] for item in data)
    assert json.loads(newest) == {"object": "list", "data": [data[-1]], "first_id": data[-1]["id"],
                                  "last_id": data[-1]["id"], "has_more": True}  # fmt: skip


@pytest.mark.parametrize(("count", "num_pages"), [(7, 3), (6, 2)])
async def test_input_items_in_pages(tokenizer: Tokenizer, count: int, num_pages: int) -> None:
    items = [{"role": "user", "content": str(number)} for number in range(count)]
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, reply = await server.post(PATH, {"input": items})
        seen, after, pages = [], "", 0
        while True:
            _, text = await server.get(f"{PATH}/{reply['id']}/input_items?limit=3{after}")
            page = json.loads(text)
            seen += [item["content"][0]["text"] for item in page["data"]]
            pages += 1
            after = f"&after={page['last_id']}"
            if not page["has_more"]:
                break
    assert (seen, pages) == (list("6543210")[-count:], num_pages)


async def test_what_is_not_stored_is_not_found(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, reply = await server.post(PATH, {"input": "hi", "store": False})
        assert reply["store"] is False
        for path in (f"{PATH}/{reply['id']}", f"{PATH}/{reply['id']}/input_items"):
            status, text = await server.get(path)
            assert (status, json.loads(text)["error"]["param"]) == (404, "response_id")
        status, wrong = await server.post(PATH, {"input": "hi", "previous_response_id": reply["id"]})
        assert (status, wrong["error"]["param"]) == (404, "previous_response_id")
        assert "Send the whole conversation" in wrong["error"]["message"]


async def test_a_server_that_stores_nothing_says_so(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x"), config(response_store_bytes=0)) as server:
        status, reply = await server.post(PATH, {"input": "hi", "store": True})
        assert (status, reply["store"]) == (200, False)
        assert (await server.get(f"{PATH}/{reply['id']}"))[0] == 404
        status, wrong = await server.post(PATH, {"input": "hi", "background": True})
        assert (status, wrong["error"]["param"]) == (400, "background")


async def test_deleted(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, reply = await server.post(PATH, {"input": "hi"})
        path = f"{PATH}/{reply['id']}"
        assert await delete(server, path) == (200, {"id": reply["id"], "object": "response", "deleted": True})
        assert (await delete(server, path))[0] == (await server.get(path))[0] == 404


async def test_store_is_bounded(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x"), config(response_store_bytes=20_000)) as server:
        ids = [(await server.post(PATH, {"input": "y" * 400}))[1]["id"] for _ in range(30)]
        found = [(await server.get(f"{PATH}/{name}"))[0] for name in ids]
        _, page = await server.get("/metrics")
        size = float(page.split("saddle:responses_stored_bytes{")[1].split()[1])
    assert found == sorted(found, reverse=True), "the oldest went first"
    assert 3 < found.count(200) < 15
    assert f'saddle:responses_stored{{engine="0",model_name="saddle-test"}} {found.count(200)}.0' in page
    assert 10_000 < size <= 20_000


async def test_background(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "Hm", "</think>", "Yes")) as server:
        server.client.pause_s = 0.02
        _, reply = await server.post(PATH, {"input": "hi", "background": True})
        path = f"{PATH}/{reply['id']}"
        assert (reply["status"], reply["output"], reply["background"]) == ("queued", [], True)
        status, text = await server.get(f"{path}/input_items")
        assert (status, "in progress" in text) == (400, True)
        status, wrong = await server.post(PATH, {"input": "hi", "previous_response_id": reply["id"]})
        assert (status, "in progress" in wrong["error"]["message"]) == (400, True)
        seen = []
        for _ in range(500):
            got = json.loads((await server.get(path))[1])
            seen.append(got["status"])
            if got["status"] == "completed":
                break
        assert set(seen) <= {"queued", "in_progress", "completed"}
        assert "in_progress" in seen
        assert got["output"][1]["content"][0]["text"] == "Yes"
        status, again = await server.post(f"{path}/cancel", {})
        assert (status, again["status"]) == (200, "completed"), "too late to change anything"
        status, text = await server.get(f"{path}?stream=true")
        assert (status, json.loads(text)["error"]["param"]) == (400, "stream")
        assert server.service.num_in_flight == 0


async def test_background_is_cancelled(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, hanging(tokenizer, "Hm", "</think>", "Half")) as server:
        _, reply = await server.post(PATH, {"input": "hi", "background": True})
        path = f"{PATH}/{reply['id']}"
        await until(lambda: bool(server.client.requests))
        for _ in range(100):
            _, text = await server.get(path)
            if "Half" in text:
                break
        status, cancelled = await server.post(f"{path}/cancel", {})
        assert (status, cancelled["status"]) == (200, "cancelled")
        assert cancelled["output"][1] == {**cancelled["output"][1], "status": "incomplete"}
        await until(lambda: server.service.num_in_flight == 0)
        assert len(server.client.aborted) == 1
        assert json.loads((await server.get(path))[1]) == cancelled
        status, wrong = await server.post(PATH, {"input": "hi", "previous_response_id": reply["id"]})
        assert (status, "cancelled" in wrong["error"]["message"]) == (400, True)
        assert (await server.post(f"{PATH}/resp_unknown/cancel", {}))[0] == 404


async def test_cancelled_at_once_or_deleted_while_it_runs(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, hanging(tokenizer, "Hm")) as server:
        for end in ("cancel", "delete"):
            _, reply = await server.post(PATH, {"input": "hi", "background": True})
            path = f"{PATH}/{reply['id']}"
            if end == "cancel":
                assert (await server.post(f"{path}/cancel", {}))[1]["status"] == "cancelled"
            else:
                assert (await delete(server, path))[0] == 200
            await until(lambda: server.service.num_in_flight == 0)
            assert (await server.get(path))[0] == (200 if end == "cancel" else 404)
    assert len(server.client.aborted) == 2


async def test_only_background_can_be_cancelled(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, reply = await server.post(PATH, {"input": "hi"})
        status, wrong = await server.post(f"{PATH}/{reply['id']}/cancel", {})
    assert (status, "background" in wrong["error"]["message"]) == (400, True)


async def test_background_stream_is_left_and_resumed(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "Hm", "</think>", "One", " two", " three")) as server:
        server.client.pause_s = 0.02
        body = {"input": "hi", "background": True, "stream": True}
        seen = ""
        async with server.http.post(server.base + PATH, json=body) as reply:
            while seen.count("\n\n") < 4:
                seen += (await reply.content.readany()).decode()
        first = parsed(seen.split("\n\n")[:-1])
        name = first[0]["response"]["id"]
        assert [frame["type"] for frame in first[:3]] == ["response.created", "response.queued", "response.in_progress"]
        _, running_rest = await server.get(f"{PATH}/{name}?stream=true&starting_after={len(first) - 1}")
        rest = parsed(running_rest.split("\n\n")[:-1])
        assert rest[0]["sequence_number"] == len(first), "nothing is missing and nothing comes twice"
        assert rest[-1]["type"] == "response.completed"
        assert rest[-1]["response"]["output"][1]["content"][0]["text"] == "One two three"
        await until(lambda: server.service.num_in_flight == 0)
        _, kept = await server.get(f"{PATH}/{name}?stream=true&starting_after={len(first) - 1}")
        assert parsed(kept.split("\n\n")[:-1]) == rest
        _, kept_whole = await server.get(f"{PATH}/{name}?stream=true")
        assert parsed(kept_whole.split("\n\n")[:-1])[: len(first)] == first
    assert server.client.aborted == [], "a client that goes away ends nothing"


async def test_a_stream_whose_client_goes_is_aborted(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, hanging(tokenizer, "Hm")) as server:
        async with server.http.post(server.base + PATH, json={"input": "hi", "stream": True}) as reply:
            await reply.content.readany()
            reply.close()
        await until(lambda: len(server.client.aborted) == 1)
        await until(lambda: server.service.num_in_flight == 0)


async def test_engine_dies(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, hanging(tokenizer, "Hm", "</think>", "Half")) as server:
        _, background = await server.post(PATH, {"input": "hi", "background": True})
        async with server.http.post(server.base + PATH, json={"input": "hi", "stream": True}) as reply:
            text = (await reply.content.readany()).decode()
            server.client.die("The engine is gone.")
            text += (await reply.read()).decode()
        told = parsed(text.split("\n\n")[:-1])
        _, kept = await server.get(f"{PATH}/{background['id']}")
    assert told[-1]["type"] == "response.failed"
    for response in (told[-1]["response"], json.loads(kept)):
        assert (response["status"], response["error"]) == (
            "failed", {"code": "server_error", "message": "The engine is gone."})  # fmt: skip


async def test_limit(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "Hm", "</think>", "Half", eos=False)) as server:
        told = await frames(server, {"input": "hi", "max_output_tokens": 3})
    response = told[-1]["response"]
    assert (told[-1]["type"], response["status"]) == ("response.incomplete", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_tools_of_other_kinds_are_left_out_and_listed(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    tools = [{"type": "web_search"}, TOOL, {"type": "custom", "name": "apply_patch"}, {"type": "local_shell"},
             {"type": "mcp", "server_label": "x"}, {"type": "web_search"}]  # fmt: skip
    body = {"tools": tools, "tool_choice": "auto", "text": {"verbosity": "low"}, "client_metadata": {"x": 1},
            "input": [{"role": "user", "content": "go"}, {"type": "web_search_call", "id": "ws"}]}  # fmt: skip
    caplog.set_level("INFO", "saddle.server.responses_routes")
    async with running(tokenizer, words(tokenizer, *CALL)) as server:
        await server.post(PATH, body)
        status, reply = await server.post(PATH, body)
        no_tools, bare = await server.post(PATH, {**body, "tools": [{"type": "web_search"}]})
    assert (status, no_tools) == (200, 200)
    assert reply["tools"] == [TOOL]
    assert reply["output"][1]["name"] == "write"
    assert reply["ignored"] == {"tools": ["web_search", "custom", "local_shell", "mcp"],
                                "input": ["web_search_call"], "fields": ["text.verbosity"]}  # fmt: skip
    assert bare["tools"] == []
    notes = [record.getMessage() for record in caplog.records if "Left out" in record.getMessage()]
    assert len(notes) == 2, "one for each kind of request, not for each request"
    assert "local_shell" in notes[0]


async def test_tools_of_a_namespace(tokenizer: Tokenizer) -> None:
    """The model knows no namespaces: its tools have both names in one."""
    space = {"type": "namespace", "name": "disk", "description": "Files.", "tools": [TOOL, {"type": "custom"}]}
    tools = [{**TOOL, "name": "read"}, space]
    spoken = ["".join(CALL).replace('"write"', '"disk__write"')]
    async with running(tokenizer, words(tokenizer, *spoken)) as server:
        long_context(server)
        told = await frames(server, {"input": "go", "tools": tools})
        first = told[-1]["response"]
        call = first["output"][1]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "written"}
        items = [{"role": "user", "content": "go"}, *first["output"], result]
        await server.post(PATH, {"input": items, "tools": tools})
        prompts = [request.prompt_ids for request in server.client.requests]
    assert (call["namespace"], call["name"]) == ("disk", "write")
    assert [frame["name"] for frame in told if frame["type"] == "response.function_call_arguments.done"] == ["write"]
    assert first["tools"] == tools
    assert first["ignored"] == {"tools": ["custom"]}
    assert '"name": "disk__write"' in prompt_of(server)
    whole = [*prompts[0], *tokenizer.encode(spoken[0]), tokenizer.eos_id]
    assert prompts[1][: len(whole)] == whole, "sent back it is the call that was generated"


async def test_calls_are_muted(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, *CALL)) as server:
        _, reply = await server.post(PATH, {"input": "hi", "tools": [TOOL], "tool_choice": "none"})
    assert [item["type"] for item in reply["output"]] == ["reasoning"]


async def test_grammars_reach_the_engine(tokenizer: Tokenizer) -> None:
    other = {**TOOL, "name": "other", "strict": True}
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "name": "out", "strict": True, "schema": schema}

    async def grammar(server: Harness, **fields: Any) -> Any:
        status, reply = await server.post(PATH, {"input": "hi", **fields})
        assert status == 200, reply
        return server.client.requests[-1].grammar

    async with running(tokenizer, words(tokenizer, "x")) as server:
        long_context(server)
        assert await grammar(server, tools=[TOOL]) is None
        assert (await grammar(server, text={"format": form})).kind == "json_schema"
        assert (await grammar(server, text={"format": {"type": "json_object"}})).kind == "json_schema"
        assert (await grammar(server, text={"format": form}, tools=[TOOL])).kind == "answer_or_tools"
        required = await grammar(server, tools=[TOOL, other], tool_choice="required")
        named = await grammar(server, tools=[TOOL, other], tool_choice={"type": "function", "name": "write"})
        single = await grammar(server, tools=[TOOL], parallel_tool_calls=False)
        strict = await grammar(server, tools=[TOOL, other])
        allowed = {"type": "allowed_tools", "tools": [{"type": "function", "name": "write"}]}
        auto = await grammar(server, tools=[TOOL, other], tool_choice={**allowed, "mode": "auto"})
        must = await grammar(server, tools=[TOOL, other], tool_choice={**allowed, "mode": "required"})
        prompts = {tuple(request.prompt_ids) for request in server.client.requests[-2:]}
    assert [each.kind for each in (required, named, single, strict, auto, must)] == [
        "tools", "tools", "text_or_tools", "text_or_tools", "text_or_tools", "tools",
    ]  # fmt: skip
    assert all(each.after_token_id == tokenizer.end_think_id for each in (required, named, single, strict, auto, must))
    for one in (named, auto, must):
        assert ('name=\\"write\\"' in one.source, 'name=\\"other\\"' in one.source) == (True, False)
    assert 'name=\\"other\\"' in required.source
    assert len(prompts) == 1, "the prompt shows all tools, whichever are allowed"


async def test_too_long_a_conversation(tokenizer: Tokenizer) -> None:
    said = [{"role": role, "content": f"{number} " + "word " * 20} for number in range(9)
            for role in ("user", "assistant")]  # fmt: skip
    body = {"input": [*said, {"role": "user", "content": "last"}], "instructions": "KEPT"}
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, wrong = await server.post(PATH, body)
        assert (status, wrong["error"]["param"]) == (400, "input_tokens")
        status, _ = await server.post(PATH, {**body, "truncation": "auto"})
        assert status == 200
        prompt = prompt_of(server)
        assert "KEPT" in prompt
        assert "last" in prompt
        assert "0 word" not in prompt
        one = {"input": "word " * 600, "truncation": "auto"}
        assert (await server.post(PATH, one))[0] == 400, "one message cannot be made shorter"


async def test_deleting_what_a_running_response_continues(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "</think>", "yes")) as server:
        _, first = await server.post(PATH, {"input": "FIRST"})
        server.client.pause_s = 0.1
        body = {"input": "SECOND", "previous_response_id": first["id"]}
        second = asyncio.ensure_future(server.post(PATH, body))
        await until(lambda: len(server.client.requests) == 2)
        async with server.http.delete(f"{server.base}{PATH}/{first['id']}") as reply:
            assert reply.status == 200
        _, answered = await second
        status, _ = await server.post(PATH, {"input": "THIRD", "previous_response_id": answered["id"]})
        assert status == 200
        prompt = prompt_of(server)
        assert prompt.index("FIRST") < prompt.index("SECOND") < prompt.index("THIRD")
        _, listed = await server.get(f"{PATH}/{answered['id']}/input_items?order=asc")
        assert [item["type"] for item in json.loads(listed)["data"]].count("message") == 3


async def test_input_is_counted(tokenizer: Tokenizer) -> None:
    body = {"input": "hi", "instructions": "x", "tools": [TOOL]}
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, counted = await server.post(f"{PATH}/input_tokens", body)
        _, reply = await server.post(PATH, body)
        assert len(server.client.requests) == 1
    assert (status, counted) == (200, {"object": "response.input_tokens",
                                       "input_tokens": reply["usage"]["input_tokens"]})  # fmt: skip


@pytest.mark.parametrize("spoken", [["Hm", "</think>", "\n\n", "Yes", ", of course"], ["Hm</think>\n\nYes, of course"]])
async def test_logprobs_are_those_of_the_answer(tokenizer: Tokenizer, spoken: list[str]) -> None:
    pieces = [*spoken, *CALL[2:]]
    body = {"input": "hi", "tools": [TOOL], "top_logprobs": 1, "include": ["message.output_text.logprobs"]}
    async with running(tokenizer, words(tokenizer, *pieces)) as server:
        told = await frames(server, body)
        _, whole = await server.post(PATH, body)
        _, without = await server.post(PATH, {"input": "hi", "tools": [TOOL]})
        assert [request.params.logprobs for request in server.client.requests] == [1, 1, None]
    (part,) = whole["output"][1]["content"]
    names = [entry["token"] for entry in part["logprobs"]]
    assert "".join(names).rstrip() == part["text"].rstrip() == "Yes, of course"
    assert part["logprobs"][0]["top_logprobs"][0]["token"] == names[0]
    (streamed,) = told[-1]["response"]["output"][1]["content"]
    assert streamed == part
    deltas = [entry for f in told if f["type"] == "response.output_text.delta" for entry in f["logprobs"]]
    (done,) = [frame["logprobs"] for frame in told if frame["type"] == "response.output_text.done"]
    assert done == part["logprobs"]
    assert deltas == done[: len(deltas)]
    assert len(deltas) > 3
    assert without["output"][1]["content"][0]["logprobs"] == []


@pytest.mark.parametrize("said", [{"input": [{"role": "developer", "content": "Say hi."}]},
                                  {"input": [], "instructions": "Say hi."}])  # fmt: skip
async def test_instructions_alone_are_a_prompt(tokenizer: Tokenizer, said: dict[str, Any]) -> None:
    """As in the other two APIs."""
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, reply = await server.post(PATH, said)
        assert status == 200, reply
        assert "system\nSay hi." in prompt_of(server)


async def test_nulls_mean_absent(tokenizer: Tokenizer) -> None:
    names = ["instructions", "tools", "tool_choice", "reasoning", "text", "include", "metadata", "store", "stream",
             "background", "max_output_tokens", "temperature", "previous_response_id", "truncation", "user",
             "conversation", "prompt", "top_logprobs", "stream_options", "model"]  # fmt: skip
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, reply = await server.post(PATH, {"input": "hi", **dict.fromkeys(names)})
    assert (status, reply["store"]) == (200, True)


# body, status, param, part of the message
WRONG: list[tuple[dict[str, Any], int, str, str]] = [
    ({"input": None}, 400, "input", "missing"),
    ({"input": []}, 400, "input", "at least one message"),
    ({"input": [5]}, 400, "input.0", "object"),
    ({"input": [{"type": "song"}]}, 400, "input.0.type", "one of message"),
    ({"model": "gpt-5"}, 404, "model", "Valid names"),
    ({"instructions": 5}, 400, "instructions", "valid string"),
    ({"previous_response_id": "resp_x"}, 404, "previous_response_id", "not found"),
    ({"background": True, "store": False}, 400, "background", "leave store out"),
    ({"stream_options": {"include_obfuscation": False}}, 400, "stream_options", "stream to be true"),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.name", "non-empty string"),
    ({"tools": [{"type": 5}]}, 400, "tools.0.type", "a string"),
    ({"tools": [{**TOOL, "parameters": []}]}, 400, "tools.0.parameters", "JSON schema"),
    ({"tools": [{**TOOL, "description": 5}]}, 400, "tools.0.description", "a string"),
    ({"tools": [{"type": "namespace", "tools": []}]}, 400, "tools.0.name", "non-empty string"),
    ({"tools": [{"type": "namespace", "name": "n"}]}, 400, "tools.0.tools", "list of tools"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": [5]}]}, 400, "tools.0.tools.0.name", "non-empty string"),
    ({"tools": [TOOL, {"type": "namespace", "name": "n", "tools": [
        {"type": "custom"}, {**TOOL, "strict": True, "parameters": {"type": "wrong"}}]}]}, 400,
     "tools.1.tools.1.parameters.type", "tools.1.tools.1.parameters.type: must be one of"),
    ({"tools": "all"}, 400, "tools", "valid array"),
    ({"tools": [TOOL, {**TOOL, "name": "g", "strict": True, "parameters": {"type": "wrong"}}]}, 400,
     "tools.1.parameters.type", "tools.1.parameters.type: must be one of"),
    ({"tools": [{"type": "mcp"}, {**TOOL, "strict": True, "parameters": {"type": "wrong"}}]}, 400,
     "tools.1.parameters.type", "tools.1.parameters.type: must be one of"),
    ({"tool_choice": "required"}, 400, "tool_choice", "needs tools"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, 400, "tool_choice", "must be"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, 400, "tool_choice", "'g'"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, 400, "tool_choice", "must be"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]}}, 400,
     "tool_choice.tools", "'g'"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "all", "tools": [TOOL]}}, 400,
     "tool_choice.mode", "auto, required"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": []}}, 400, "tool_choice.tools",
     "at least one"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens", "at least 1"),
    ({"max_tool_calls": 0}, 400, "max_tool_calls", "at least 1"),
    ({"reasoning": {"effort": "huge"}}, 400, "reasoning.effort", "one of none, minimal"),
    ({"reasoning": {"summary": "yes"}}, 400, "reasoning.summary", "auto, concise"),
    ({"text": {"verbosity": "chatty"}}, 400, "text.verbosity", "low, medium"),
    ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type", "json_schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.schema", "JSON schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": "wrong"}}}}, 400, "text.format.schema.type",
     "one of"),
    ({"include": ["message.output_video"]}, 400, "include.0", "one of"),
    ({"truncation": "middle"}, 400, "truncation", "auto, disabled"),
    ({"service_tier": "gold"}, 400, "service_tier", "one of"),
    ({"metadata": {"a": 1}}, 400, "metadata.a", "strings"),
    ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata", "at most 16"),
    ({"temperature": 3}, 400, "temperature", "between 0 and 2"),
    ({"top_p": 0}, 400, "top_p", "above 0"),
    ({"top_logprobs": 21}, 400, "top_logprobs", "from 0 to 20"),
    ({"top_logprobs": -1}, 400, "top_logprobs", "from 0 to 20"),
    ({"conversation": "conv_1"}, 400, "conversation", "previous_response_id"),
    ({"prompt": {"id": "pmpt_1"}}, 400, "prompt", "as input"),
    ({"context_management": [{"type": "compaction"}]}, 400, "context_management", "truncation"),
]


async def test_what_is_refused(tokenizer: Tokenizer) -> None:
    wrong = []
    async with running(tokenizer, words(tokenizer, "x")) as server:
        for body, status, param, part in WRONG:
            got, reply = await server.post(PATH, {"input": "hi", **body})
            error = reply.get("error", {})
            if not (got == status and error["param"] == param and part in error["message"]):
                wrong.append((body, got, reply))
        assert server.client.requests == [], "nothing of it reached the engine"
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("query", "param"),
    [("input_items?limit=0", "limit"), ("input_items?limit=x", "limit"), ("input_items?order=up", "order"),
     ("input_items?after=msg_x", "after"), ("?stream=yes", "stream"), ("?stream=true", "stream"),
     ("?starting_after=-1", "starting_after")],
)  # fmt: skip
async def test_queries_that_are_refused(tokenizer: Tokenizer, query: str, param: str) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, reply = await server.post(PATH, {"input": "hi"})
        status, text = await server.get(f"{PATH}/{reply['id']}{'' if query[0] == '?' else '/'}{query}")
    assert (status, json.loads(text)["error"]["param"]) == (400, param)
