"""`saddle chat` as a process against a scripted server: streams, history, tool calls, cancellation, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from saddle.cli import chat

ANSWER = [{"role": "assistant", "content": ""}, {"reasoning": "let me ", "reasoning_content": "let me "},
          {"reasoning_content": "see [x]"}, {"content": "\n\nIt is "}, {"content": ":smile:\t4."}]  # fmt: skip
CALL = [
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "2}"}}]},
]


class Server:
    """Answers the n-th request with the n-th script: deltas, None to hang, "stop" to end without [DONE], "finish" for a
    finish reason; an int instead of a script is a status."""

    def __init__(self) -> None:
        self.scripts: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.gone = asyncio.Event()
        self.hanging = asyncio.Event()
        self.url = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        script = self.scripts[len(self.bodies) - 1]
        if isinstance(script, int):
            return web.json_response({"error": {"message": "no such thing"}}, status=script)
        response = web.StreamResponse()
        await response.prepare(request)
        for delta in script:
            if delta is None:
                self.hanging.set()
                try:
                    await asyncio.sleep(20)
                finally:
                    self.gone.set()
            elif "stop" in delta:
                return response
            finish = delta.pop("finish", None)
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            event = delta if "error" in delta else {"choices": [choice]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    script = Server()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", script.chat)
    app.router.add_get("/v1/models", models)
    test_server = TestServer(app)
    await test_server.start_server()
    script.url = str(test_server.make_url("/v1"))
    yield script
    await test_server.close()


async def models(_: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "m2"}]})


async def start(*argv: str, **streams: Any) -> asyncio.subprocess.Process:
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "saddle", "chat", *argv, **{**pipes, **streams})


async def talk(text: str, *argv: str) -> tuple[str, str, int | None]:
    process = await start(*argv)
    out, err = await asyncio.wait_for(process.communicate(text.encode()), 20)
    return out.decode(), err.decode(), process.returncode


async def test_one_question_through_a_pipe(server: Server) -> None:
    server.scripts = [ANSWER]
    out, err, code = await talk("", "What is 2+2?", "--url", server.url, "--system", "Be brief.", "--api-key", "k",
                                "--max-tok", "9", "--temperature", "0")  # fmt: skip
    assert out == "It is :smile:\t4.\n"  # the answer alone and unchanged
    assert "let me see [x]" in err
    assert code == 0
    assert server.bodies == [{
        "model": "m2", "stream": True, "max_tokens": 9, "temperature": 0.0,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}],
    }]  # fmt: skip
    assert server.keys == ["Bearer k"]


async def test_conversation_keeps_thinking_and_tools(server: Server, tmp_path: Path) -> None:
    server.scripts = [ANSWER, CALL, [{"content": "done"}], [{"content": "fresh"}]]
    tools = [{"type": "function", "function": {"name": "add"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    text = "hi\n\nadd it\n5\n/clear\n/help\nagain\n/exit\nnot sent\n"
    out, err, code = await talk(text, "--url", server.url, "--tools", str(tmp_path / "tools.json"), "--model", "x")
    assert code == 0
    assert out == "It is :smile:\t4.\ndone\nfresh\n"
    assert "tool call: add" in err
    assert '"a": 2' in err
    assert "/clear and /exit" in err
    first = {"role": "assistant", "content": "\n\nIt is :smile:\t4.", "reasoning_content": "let me see [x]"}
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    assert server.bodies[2]["messages"] == [
        {"role": "user", "content": "hi"}, first, {"role": "user", "content": "add it"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ]  # fmt: skip
    assert server.bodies[3]["messages"] == [{"role": "user", "content": "again"}]
    assert len(server.bodies) == 4  # nothing after /exit
    assert all(body["tools"] == tools and body["model"] == "x" for body in server.bodies)


async def test_interrupt_cancels_the_turn_and_the_request(server: Server) -> None:
    server.scripts = [[{"reasoning_content": "hm"}, None], [{"content": "half"}, None], [{"content": "whole"}]]
    process = await start("--url", server.url)
    assert process.stdin is not None
    for line in (b"one\n", b"two\n"):
        process.stdin.write(line)
        await asyncio.wait_for(server.hanging.wait(), 20)
        await asyncio.sleep(0.2)
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(server.gone.wait(), 5)  # the server saw the connection close
        server.hanging.clear()
        server.gone.clear()
    out, err = await asyncio.wait_for(process.communicate(b"three\n"), 20)
    assert process.returncode == 0
    assert out.decode() == "half\nwhole\n"
    assert err.decode().count("[cancelled]") == 2
    assert server.bodies[2]["messages"] == [  # the first turn is gone, what was said of the second stays
        {"role": "user", "content": "two"}, {"role": "assistant", "content": "half"},
        {"role": "user", "content": "three"},
    ]  # fmt: skip


async def test_errors_are_one_line(server: Server) -> None:
    server.scripts = [404, [{"content": "a"}, {"error": {"message": "device lost"}}], [{"content": "fine"}]]
    out, err, code = await talk("one\ntwo\nthree\n", "--url", server.url)
    assert code == 0
    assert "[HTTP 404: no such thing]" in err
    assert "[the stream failed: device lost]" in err
    assert out == "a\nfine\n"
    server.scripts.append(404)
    _, err, code = await talk("", "question", "--url", server.url)
    assert (code, err) == (1, "saddle chat: HTTP 404: no such thing\n")
    _, err, code = await talk("", "--url", "http://127.0.0.1:9/v1")
    assert code == 1
    assert "http://127.0.0.1:9/v1 does not answer" in err
    assert "Traceback" not in err


async def test_unanswered_tool_call(server: Server) -> None:
    server.scripts = [CALL]
    out, _, code = await talk("add\n", "--url", server.url)
    assert (out, code, len(server.bodies)) == ("", 0, 1)


def test_interrupt_instead_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that the user does not answer are answered for him, so that the history stays whole."""
    typed = iter(["5"])

    def ask(prompt: str) -> str:
        for line in typed:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_ask", ask)
    talk = chat.Chat(None, "", "m", None, {}, None)  # type: ignore[arg-type]
    calls = [chat.Call("c1", "add", "{}"), chat.Call("c2", "add", "{}")]
    talk.history.append(chat.Turn(calls=calls).message())
    assert chat._answer_calls(None, talk, calls) is None  # type: ignore[arg-type]
    assert [(m["tool_call_id"], m["content"]) for m in talk.history[1:]] == [
        ("c1", "5"), ("c2", "The user did not run this tool."),
    ]  # fmt: skip


async def test_cut_off_call(server: Server) -> None:
    server.scripts = [[*CALL[:2], {"finish": "length"}]]
    _, err, code = await talk("", "add", "--url", server.url)
    assert code == 0
    assert '{"a":' in err
    assert "[the answer was cut off by the token limit]" in err


async def test_stream_without_an_end(server: Server) -> None:
    server.scripts = [[{"content": "a"}, {"stop": "here"}]]
    out, err, code = await talk("", "add", "--url", server.url)
    assert (out, code) == ("a\n", 1)
    assert err.endswith("broke off: the stream ended without [DONE]\n")


async def test_terminal(server: Server) -> None:
    """On a terminal thinking is dimmed and the answer is not, and escapes of the model do nothing."""
    server.scripts = [[{"reasoning_content": "think"}, {"content": "plain\x1b[2Jx"}]]
    leader, follower = pty.openpty()
    process = await start("hello", "--url", server.url, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    assert await asyncio.wait_for(process.wait(), 20) == 0
    shown = b""
    with contextlib.suppress(OSError):  # end of a terminal
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert b"\x1b[2;3mthink" in shown
    assert "plain\N{SYMBOL FOR ESCAPE}[2Jx".encode() in shown
    assert b"\x1b[2J" not in shown
