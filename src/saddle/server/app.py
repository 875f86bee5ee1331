"""The FastAPI application: routes that only connect the pure functions of an API with the service, and error shapes."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from saddle.config import ServerConfig
from saddle.errors import RequestError
from saddle.server import admin, openai, openai_text, responses_routes
from saddle.server.anthropic_routes import anthropic_router
from saddle.server.bodies import read, takes
from saddle.server.error_shapes import error_for, refusal_for
from saddle.server.gate import Gate
from saddle.server.openai_answers import CHAT, COMPLETION, streamed
from saddle.server.openai_parts import TokenNames
from saddle.server.replies import JSONReply, sanitised
from saddle.server.service import Service
from saddle.server.sse import ClientGone, EventStream, GenerationFailed, unless_gone, whole
from saddle.server.wire_openai import ChatBody, CompletionBody
from saddle.version import VERSION

CLIENT_CLOSED = 499  # nobody reads it; the access log does


def build_app(service: Service, config: ServerConfig) -> FastAPI:
    """All routes of a server over one service."""
    app = FastAPI(title="Saddle", version=VERSION, redoc_url=None)
    app.include_router(admin.router(service))
    app.include_router(openai_router(service))
    app.include_router(anthropic_router(service))
    app.include_router(responses_routes.router(service))
    app.add_middleware(Gate, api_keys=config.api_keys, max_body_bytes=config.max_body_bytes)
    if config.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["*"],
                           allow_headers=["*"], expose_headers=["x-request-id"])  # fmt: skip
    _add_error_shapes(app)
    return app


def openai_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])
    config = service.config

    @router.post("/v1/chat/completions", responses=streamed(CHAT), openapi_extra=takes(ChatBody))
    async def chat_completions(request: Request) -> Response:
        facts = service.facts()
        body, request_id = await read(request, ChatBody), request.state.request_id
        if body.tools or body.response_format or body.structured_outputs or body.bad_words:  # these take a while
            asked = await service.apart(openai.to_request, body, facts, request_id)
        else:
            asked = openai.to_request(body, facts, request_id)
        names = TokenNames(service.tokenizer, asked.tokens_as_ids)
        generation = await unless_gone(request.receive, service.open(asked.job))
        if asked.stream:
            encoder = openai.ChatStream(asked, names, generation.prompts, config.reasoning_field)
            return EventStream(generation, encoder, config.sse_keep_alive_s)
        choices = await whole(request.receive, generation)
        made = asked, names, generation.prompts, choices, config.reasoning_field
        # Log-probabilities of a long prompt take a second to write down.
        return JSONReply(await service.apart(openai.to_response, *made) if asked.job.want_tokens
                         else openai.to_response(*made))  # fmt: skip

    @router.post("/v1/completions", responses=streamed(COMPLETION), openapi_extra=takes(CompletionBody))
    async def completions(request: Request) -> Response:
        facts = service.facts()
        body, request_id = await read(request, CompletionBody), request.state.request_id
        if body.response_format or body.structured_outputs or body.bad_words:
            asked = await service.apart(openai_text.to_request, body, facts, request_id)
        else:
            asked = openai_text.to_request(body, facts, request_id)
        names = TokenNames(service.tokenizer, asked.tokens_as_ids)
        generation = await unless_gone(request.receive, service.open(asked.job))
        echoes = openai_text.prompt_texts(asked, generation.prompts, service.tokenizer)
        if asked.stream:
            encoder = openai_text.TextStream(asked, names, generation.prompts, echoes)
            return EventStream(generation, encoder, config.sse_keep_alive_s)
        choices = await whole(request.receive, generation)
        made = asked, names, generation.prompts, choices, echoes
        return JSONReply(await service.apart(openai_text.to_response, *made) if asked.job.want_tokens
                         else openai_text.to_response(*made))  # fmt: skip

    return router


def _add_error_shapes(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return refusal_for(request.scope, error)

    @app.exception_handler(GenerationFailed)
    async def failed(request: Request, error: GenerationFailed) -> Response:
        return error_for(request.scope, error.status, sanitised(str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path[:200]}: {message}."
        return error_for(request.scope, error.status_code, message, headers=error.headers)

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return error_for(request.scope, 500, "The server failed on this request; its log has the details.")
