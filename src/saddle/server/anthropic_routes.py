"""The routes of Anthropic's Messages API: they connect its pure functions with the service.

Keys come as `x-api-key` or `Authorization` (`gate.py`). The headers `anthropic-version` and `anthropic-beta` are
accepted and change nothing.
"""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request
from starlette.responses import Response

from saddle.server import anthropic
from saddle.server.anthropic import AskedPrompt
from saddle.server.anthropic_parts import REQUEST_ID, Signer
from saddle.server.anthropic_stream import PING, MessageStream
from saddle.server.bodies import read, takes
from saddle.server.replies import JSONReply, encode_json
from saddle.server.service import Service
from saddle.server.sse import EventStream, unless_gone, whole
from saddle.server.wire_anthropic import COUNT, MESSAGE, CountBody, MessagesBody

logger = logging.getLogger(__name__)
MAX_NOTED = 100  # kinds of ignored things that the log is told of: clients make them up


def anthropic_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["Anthropic"])
    config, signer = service.config, Signer()
    noted: set[str] = set()  # what the log was told of already: agents say it in every request

    def note(asked: AskedPrompt) -> None:
        kinds = {f"tools of type {kind}" for kind in asked.tools.ignored.values()}
        kinds |= {f"blocks of type {kind}" for kind in asked.turns.ignored}
        if asked.turns.num_foreign:
            kinds.add("signatures of thinking that this server did not write; the thinking itself counts")
        for kind in sorted(kinds - noted)[: MAX_NOTED - len(noted)]:
            noted.add(kind)
            logger.info("Messages API: ignored %s (said once).", kind)

    @router.post("/v1/messages", responses=MESSAGE, openapi_extra=takes(MessagesBody))
    async def messages(request: Request) -> Response:
        facts, request_id = service.facts(), request.state.request_id
        body = await read(request, MessagesBody)
        asked, prompt = await service.apart(anthropic.to_request, body, facts, signer, request_id)
        note(prompt)
        generation = await unless_gone(request.receive, service.open(asked.job))
        if asked.stream:
            encoder = MessageStream(
                asked, signer, len(generation.prompts[0]), lambda: generation.num_cached_tokens, request_id
            )
            reply: Response = EventStream(generation, encoder, config.sse_keep_alive_s, PING)
        else:
            (events,) = await whole(request.receive, generation)
            reply = JSONReply(anthropic.to_response(asked, events, signer))
        reply.headers[REQUEST_ID] = request_id
        return reply

    @router.post("/v1/messages/count_tokens", responses=COUNT, openapi_extra=takes(CountBody))
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of a message would have; nothing is generated."""
        facts = service.facts()
        body = await read(request, CountBody)
        asked = await service.apart(anthropic.to_prompt, body, facts, signer)
        note(asked)
        num_tokens = len(await service.count(asked.prompt))
        counted: dict[str, object] = {"input_tokens": num_tokens}
        if body.context_management is not None:
            counted["context_management"] = {"original_input_tokens": num_tokens}
        return JSONReply(encode_json(counted), headers={REQUEST_ID: request.state.request_id})

    return router
