"""Routes beside the APIs: is it alive, is it ready, what does it serve, what does it count, how does it tokenise."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from saddle.errors import InvalidRequest, NotFound
from saddle.metrics import CONTENT_TYPE
from saddle.server.bodies import ERRORS, read, takes
from saddle.server.job import ChatPrompt, TextPrompt
from saddle.server.replies import JSONReply
from saddle.server.schemas import COUNT, IDS, NUMBER, TEXT, answers, list_of, object_of, one_of, or_null
from saddle.server.service import Service
from saddle.server.wire_openai import DetokenizeBody, TokenizeBody
from saddle.version import VERSION

WELCOME = """Saddle {version} serves {model}.

POST /v1/chat/completions   OpenAI chat
POST /v1/completions        OpenAI completions
POST /v1/responses          OpenAI responses
POST /v1/messages           Anthropic messages, with /count_tokens
GET  /v1/models             what is served, with max_model_len
POST /tokenize, /detokenize
GET  /livez, /health, /ping, /version, /load, /metrics
GET  /docs                  every field of every request
"""
STATUS = object_of({"status": one_of("alive", "ready")})
UNREADY: dict[int | str, dict[str, Any]] = {**answers(STATUS), 503: {
    "description": "Loading, draining or dead; says which.",
    "content": {"application/json": {"schema": object_of(
        {"status": one_of("loading", "draining", "dead"), "message": TEXT},
        {"phase": TEXT, "progress": NUMBER, "note": TEXT},
    )}},
}}  # fmt: skip
MODEL = object_of({
    "id": TEXT,
    "object": {"const": "model"},
    "created": COUNT,
    "owned_by": TEXT,
    "root": TEXT,
    "parent": {"type": "null"},
    "max_model_len": COUNT,
    "type": {"const": "model"},
    "display_name": TEXT,
    "created_at": TEXT,
    "max_input_tokens": COUNT,
})  # fmt: skip
MODELS = object_of({"object": {"const": "list"}, "data": list_of(MODEL), "has_more": {"const": False}, "first_id": TEXT,
                    "last_id": TEXT})  # fmt: skip
TOKENS = object_of({"count": COUNT, "max_model_len": COUNT, "tokens": IDS, "token_strs": or_null(list_of(TEXT))})


def router(service: Service) -> APIRouter:
    """Health and counters are open to everybody; the rest is behind the API keys."""
    admin = APIRouter(tags=["server"])
    _add_health(admin, service)
    _add_models(admin, service)
    _add_tokens(admin, service)
    return admin


def _add_health(admin: APIRouter, service: Service) -> None:
    @admin.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return PlainTextResponse(WELCOME.format(version=VERSION, model=service.model_names[0]))

    @admin.get("/livez", responses=answers(STATUS))
    async def livez() -> Response:
        """200 as long as the process answers."""
        return JSONReply({"status": "alive"})

    @admin.get("/health", responses=UNREADY)
    async def health() -> Response:
        """200 when requests are served; 503 while loading, draining or dead, with the phase of loading."""
        state, reason = service.client.state, service.unavailable()
        if reason is None:
            return JSONReply({"status": "ready"})
        status = "dead" if state.dead is not None else "draining" if service.draining else "loading"
        body: dict[str, Any] = {"status": status, "message": reason.message}
        if status == "loading":
            body |= {"phase": state.phase, "progress": round(state.share, 4), "note": state.note}
        headers = {"Retry-After": str(reason.retry_after)} if reason.retry_after is not None else None
        return JSONReply(body, status_code=503, headers=headers)

    admin.add_api_route("/ping", health, methods=["GET"], operation_id="ping", responses=UNREADY)
    admin.add_api_route("/ping", health, methods=["POST"], operation_id="ping_by_post", responses=UNREADY)

    @admin.get("/version", responses=answers(object_of({"version": TEXT})))
    async def version() -> Response:
        return JSONReply({"version": VERSION})

    @admin.get("/load", responses=answers(object_of({"server_load": COUNT})))
    async def load() -> Response:
        """Requests being admitted or answered."""
        return JSONReply({"server_load": service.num_in_flight})

    @admin.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.expose(), media_type=CONTENT_TYPE)


def _add_models(admin: APIRouter, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        """A model in the words of OpenAI, then of Anthropic: clients read what they know."""
        longest = service.facts().max_model_len
        return {
            "id": name,
            "object": "model",
            "created": service.created_s,
            "owned_by": "saddle",
            "root": service.model_names[0],
            "parent": None,
            "max_model_len": longest,
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(service.created_s, timezone.utc).isoformat().replace("+00:00", "Z"),
            "max_input_tokens": longest,
        }

    @admin.get("/v1/models", responses={**answers(MODELS), **ERRORS})
    async def models() -> Response:
        names = service.model_names
        return JSONReply({"object": "list", "data": [card(name) for name in names],
                          "has_more": False, "first_id": names[0], "last_id": names[-1]})  # fmt: skip

    @admin.get("/v1/models/{name:path}", responses={**answers(MODEL), **ERRORS})
    async def model(name: str) -> Response:
        if name not in service.model_names:
            raise NotFound(f"The model `{name}` does not exist.", param="model")
        return JSONReply(card(name))


def _add_tokens(admin: APIRouter, service: Service) -> None:
    @admin.post("/tokenize", responses={**answers(TOKENS), **ERRORS}, openapi_extra=takes(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        facts = service.facts()
        body = await read(request, TokenizeBody)
        facts.check_model(body.model)
        ids = await service.count(_prompt(body, service.config.default_chat_template_kwargs))
        strings = await service.apart(service.tokenizer.token_texts, ids) if body.return_token_strs else None
        return JSONReply({"count": len(ids), "max_model_len": facts.max_model_len, "tokens": ids,
                          "token_strs": strings})  # fmt: skip

    @admin.post("/detokenize", responses={**answers(object_of({"prompt": TEXT})), **ERRORS},
                openapi_extra=takes(DetokenizeBody))  # fmt: skip
    async def detokenize(request: Request) -> Response:
        facts = service.facts()
        body = await read(request, DetokenizeBody)
        facts.check_model(body.model)
        facts.check_token_ids(body.tokens, "tokens")
        return JSONReply({"prompt": await service.apart(service.tokenizer.decode, body.tokens, False)})


def _prompt(body: TokenizeBody, defaults: Mapping[str, Any]) -> ChatPrompt | TextPrompt:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either prompt or messages.", param="prompt" if body.prompt is None else "messages")
    if body.messages is None:
        return TextPrompt(body.prompt or "")
    return ChatPrompt(
        messages=body.messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs={**defaults, **(body.chat_template_kwargs or {})},
    )
