"""The routes of OpenAI's responses API, and what is kept between its requests: stored responses, and those that run.

Reading, cancelling and deleting need nothing but an id: ids are random, and a server has one tenant.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from saddle.errors import ContextTooLong, InvalidRequest
from saddle.server import responses
from saddle.server.bodies import read, takes
from saddle.server.generation import Generation
from saddle.server.job import ChatPrompt
from saddle.server.replies import JSONReply, encode_json
from saddle.server.responses import AskedResponse
from saddle.server.responses_answers import COUNTED, DELETED, LISTED, STORED, STREAMED
from saddle.server.responses_background import Follow, Run, offset_after
from saddle.server.responses_items import Item, Seal
from saddle.server.responses_logprobs import AnswerLogprobs
from saddle.server.responses_store import ResponseStore, Stored, items_of
from saddle.server.responses_stream import Answer
from saddle.server.service import Service
from saddle.server.sse import HEADERS, EventStream, unless_gone, whole
from saddle.server.wire_responses import ResponsesBody

logger = logging.getLogger(__name__)
MAX_LISTED = 100
MAX_TOLD = 100  # kinds of notes in the log


class Responses:
    """What the routes do."""

    def __init__(self, service: Service) -> None:
        self._service, self._config = service, service.config
        self._seal = Seal()
        self.store = ResponseStore(service.config.response_store_bytes)
        self.runs: dict[str, Run] = {}
        self._told: set[str] = set()

    async def create(self, request: Request) -> Response:
        asked, line = await self._asked(request)
        generation = await unless_gone(request.receive, self._open(asked))
        if asked.background:
            run = self._run(generation, asked, line)
            return Follow(run, self._config.sse_keep_alive_s) if asked.stream else JSONReply(run.answer.body())
        answer = self._answer(asked, generation, lambda answer: self._keep(asked, answer, line))
        if asked.stream:
            return EventStream(generation, answer, self._config.sse_keep_alive_s)
        (events,) = await whole(request.receive, generation)
        answer.encode(0, events)
        return JSONReply(answer.body())

    async def count(self, request: Request) -> Response:
        asked, _ = await self._asked(request)
        ids = await unless_gone(request.receive, self._service.count(asked.job.prompts[0]))
        return JSONReply({"object": "response.input_tokens", "input_tokens": len(ids)})

    def read(self, response_id: str, stream: bool, after: int) -> Response:
        run = self.runs.get(response_id)
        stored = None if run is not None else self.store.get(response_id)
        if not stream:
            return JSONReply(run.answer.body() if run is not None else stored.body)  # type: ignore[union-attr]
        frames = run.frames if run is not None else stored.frames  # type: ignore[union-attr]
        if not frames:
            raise InvalidRequest("stream is possible only for responses created with background and stream.", "stream")
        if run is not None:
            return Follow(run, self._config.sse_keep_alive_s, after)
        return Response(bytes(frames[offset_after(frames, after) :]), headers=HEADERS, media_type="text/event-stream")

    def delete(self, response_id: str) -> Response:
        run = self.runs.pop(response_id, None)
        if run is not None:
            run.cancel()
        else:
            self.store.delete(response_id)
            self._count_stored()
        return JSONReply({"id": response_id, "object": "response", "deleted": True})

    def cancel(self, response_id: str) -> Response:
        run = self.runs.get(response_id)
        if run is not None:
            run.cancel()
            return JSONReply(run.answer.body())
        stored = self.store.get(response_id)
        if not stored.background:
            raise InvalidRequest("Only a response created with background can be cancelled; to end another one, close "
                                 "its connection.", "response_id")  # fmt: skip
        return JSONReply(stored.body)

    def input_items(self, response_id: str, after: str | None, limit: int, order: str) -> Response:
        """The input of a response and all that it stands on, the newest first unless `order` is asc."""
        if not 1 <= limit <= MAX_LISTED:
            raise InvalidRequest(f"limit must be from 1 to {MAX_LISTED}, got {limit}.", "limit")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"order must be asc or desc, got {order[:80]!r}.", "order")
        if response_id in self.runs:
            raise InvalidRequest("The response is in progress: its input can be listed when it has ended.",
                                 "response_id")  # fmt: skip
        items: list[Item] = []
        line = self.store.line(self.store.get(response_id))
        for each in line:
            items += each.input_items + (each.output_items if each is not line[-1] else [])
        if order == "desc":
            items.reverse()
        if after is not None:
            places = [n for n, item in enumerate(items) if item.get("id") == after]
            if not places:
                raise InvalidRequest(f"after names no input item: {after[:100]!r}.", "after")
            items = items[places[0] + 1 :]
        page = items[:limit]
        return JSONReply({"object": "list", "data": page, "first_id": page[0]["id"] if page else None,
                          "last_id": page[-1]["id"] if page else None, "has_more": len(items) > limit})  # fmt: skip

    # one response -------------------------------------------------------------------------------------------------

    async def _asked(self, request: Request) -> tuple[AskedResponse, list[Stored]]:
        """(what a request asks for, the responses that it continues)."""
        facts = self._service.facts()
        body = await read(request, ResponsesBody)
        line: list[Stored] = []
        if body.previous_response_id is not None:
            if body.previous_response_id in self.runs:
                raise InvalidRequest("The previous response is still in progress.", "previous_response_id")
            line = self.store.conversation(body.previous_response_id)

        def read_all() -> AskedResponse:
            return responses.to_request(body, facts, items_of(line), self._seal, request.state.request_id)

        asked = await self._service.apart(read_all)
        self._tell(str(asked.fixed.get("ignored", "")))
        return asked, line

    def _tell(self, ignored: str) -> None:
        """Log what was left out of a request; the same of many requests once."""
        if ignored and ignored not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(ignored)
            logger.info("Left out of a response: %s. Further ones with the same are not logged.", ignored[:500])

    async def _open(self, asked: AskedResponse) -> Generation:
        """Admit the job; `truncation: auto` leaves out the oldest rounds of a conversation that is too long."""
        job, num_left_out = asked.job, 0
        while True:
            try:
                return await self._service.open(job)
            except ContextTooLong:
                prompt = asked.job.prompts[0]
                assert isinstance(prompt, ChatPrompt)
                num_left_out = max(1, 2 * num_left_out)
                messages = responses.shorter(prompt.messages, num_left_out) if asked.shortens else None
                if messages is None:
                    raise
                job = dataclasses.replace(job, prompts=(dataclasses.replace(prompt, messages=messages),))

    def _answer(self, asked: AskedResponse, generation: Generation, on_end: Callable[[Answer], None] | None) -> Answer:
        tokenizer, logprobs = self._service.tokenizer, None
        if asked.num_logprobs is not None:
            logprobs = AnswerLogprobs(tokenizer, asked.num_logprobs, tokenizer.is_thinking(generation.prompts[0]))
        return Answer(
            asked.id,
            asked.key,
            asked.fixed,
            seal=self._seal if asked.seals else None,
            spaces=asked.spaces,
            summary=asked.summary,
            frames=asked.stream,
            queued=asked.background,
            on_end=on_end,
            logprobs=logprobs,
            prompt_ids=generation.prompts[0] if asked.return_token_ids else None,
        )

    def _run(self, generation: Generation, asked: AskedResponse, line: list[Stored]) -> Run:
        def ended(run: Run) -> None:
            if self.runs.pop(asked.id, None) is not None:  # else it was deleted
                self._keep(asked, run.answer, line, bytes(run.frames) or None)

        run = self.runs[asked.id] = Run(generation, self._answer(asked, generation, None), ended)
        return run

    def _keep(
        self, asked: AskedResponse, answer: Answer, line: list[Stored], frames: bytes | None = None
    ) -> None:
        if not asked.store:
            return
        stored = Stored(asked.id, answer.status, answer.body(), encode_json(asked.items), asked.previous,
                        asked.background, frames)  # fmt: skip
        if not self.store.put(stored, line):
            logger.warning("%s: a response of %d bytes was not stored: it does not fit (--response-store-bytes).",
                           asked.id, stored.num_bytes)  # fmt: skip
        self._count_stored()

    def _count_stored(self) -> None:
        metrics = self._service.metrics
        metrics.num_responses, metrics.num_response_bytes = len(self.store), self.store.num_bytes


def router(service: Service) -> APIRouter:
    made, api = APIRouter(tags=["Responses"]), Responses(service)

    @made.post("/v1/responses", responses=STREAMED, openapi_extra=takes(ResponsesBody))
    async def create_response(request: Request) -> Response:
        return await api.create(request)

    @made.post("/v1/responses/input_tokens", responses=COUNTED, openapi_extra=takes(ResponsesBody))
    async def count_input_tokens(request: Request) -> Response:
        return await api.count(request)

    @made.get("/v1/responses/{response_id}", responses=STREAMED)
    async def read_response(
        response_id: str, stream: str = "false", starting_after: str | None = None
    ) -> Response:
        if stream not in ("true", "false"):
            raise InvalidRequest(f"stream must be true or false, got {stream[:80]!r}.", "stream")
        after = -1 if starting_after is None else _number(starting_after, "starting_after")
        return api.read(response_id, stream == "true", after)

    @made.delete("/v1/responses/{response_id}", responses=DELETED)
    async def delete_response(response_id: str) -> Response:
        return api.delete(response_id)

    @made.post("/v1/responses/{response_id}/cancel", responses=STORED)
    async def cancel_response(response_id: str) -> Response:
        return api.cancel(response_id)

    @made.get("/v1/responses/{response_id}/input_items", responses=LISTED)
    async def list_input_items(
        response_id: str, after: str | None = None, limit: str = "20", order: str = "desc"
    ) -> Response:
        return api.input_items(response_id, after, _number(limit, "limit"), order)

    return made


def _number(text: str, param: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidRequest(f"{param} must be a number of 0 or more, got {text[:80]!r}.", param)
    return int(text)
