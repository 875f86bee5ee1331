"""The life of the API process: open the port, serve, drain, end with a code.

    start         the port answers at once; /health is 503 until the engine is ready
    SIGTERM       new requests get 503 with Retry-After, running ones may finish for `shutdown_timeout_s`
    second one    what still runs ends with an error at once
    engine dies   every request ends with an error, the process with code 1
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Coroutine, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from saddle.config import ServerConfig
from saddle.engine.client import EngineClient
from saddle.errors import EngineDead, StartupError
from saddle.protocol import EngineStats
from saddle.server.progress import show_loading
from saddle.server.service import Service
from saddle.version import VERSION

logger = logging.getLogger(__name__)

BACKLOG = 2048
REPORT_EVERY_S = 10.0
LAST_WORDS_S = 1.0  # for requests to write their error after the engine is gone
STOP_ENGINE_S = 5.0
# Objects between two collections, and collections between two of the next generation. Hardly anything here is a cycle,
# and the log-probabilities of a long prompt are a million objects at once: walked again and again by the default.
COLLECT_AFTER = (20_000, 10, 10)
EXIT_DRAINED, EXIT_ENGINE_DIED = 0, 1


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run the server's main coroutine on uvloop where there is one."""
    if sys.platform == "win32":
        return asyncio.run(main)
    import uvloop

    return int(uvloop.run(main))


def listen(config: ServerConfig) -> socket.socket:
    """The socket that the server will answer on, bound and not yet accepting.

    Raises:
        StartupError: the address cannot be had; says why.
    """
    if config.uds is not None:
        return _listen_unix(config.uds)
    host = config.host or "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, event loops switch off Nagle's delay on what it accepts: 40 ms an answer otherwise.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, config.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"Port {config.port} of {host} is in use; choose another with --port.") from None
        raise StartupError(f"Cannot listen on {host} port {config.port}: {error.strerror or error}.") from None
    return sock


def _listen_unix(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise StartupError(f"--uds {path} is a file already.")
        os.unlink(path)  # left behind by a server that was killed
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise StartupError(f"Cannot listen on --uds {path}: {error.strerror or error}.") from None
    sock.listen(BACKLOG)
    return sock


def address(config: ServerConfig, sock: socket.socket) -> str:
    """Where to point a client."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = sock.getsockname()[:2]
    host = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{host}:{port}{config.root_path}"


class HTTPServer(uvicorn.Server):
    """uvicorn without its signal handling: when to stop is decided below."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: FastAPI, config: ServerConfig) -> HTTPServer:
    """Raises StartupError when the TLS files cannot be read."""
    settings = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=config.access_log,
        server_header=False,
        root_path=config.root_path,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        timeout_graceful_shutdown=int(LAST_WORDS_S),
    )
    try:
        settings.load()
    except OSError as error:
        raise StartupError(f"--ssl-certfile, --ssl-keyfile: {error.strerror or error}.") from None
    return HTTPServer(settings)


async def serve(
    app: FastAPI, service: Service, client: EngineClient, config: ServerConfig, sock: socket.socket
) -> int:
    """Serve until a signal or the end of the engine; returns the exit code of the process.

    Args:
        sock: from `listen`; closed at the end.

    Raises:
        StartupError: the engine cannot start, or the TLS files cannot be read.
    """
    http = http_server(app, config)
    signals: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    serving = asyncio.ensure_future(http.serve(sockets=[sock]))
    reporting = asyncio.ensure_future(_report(service, client, address(config, sock)))
    died = asyncio.ensure_future(client.wait_dead())
    signalled = asyncio.ensure_future(signals.get())
    try:
        await asyncio.wait({serving, died, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            return await _engine_died(service, client)
        if serving.done():
            serving.result()
            raise StartupError("The HTTP server ended by itself.")
        return await _drain(service, client, signals, signalled.result(), config.shutdown_timeout_s)
    finally:
        for task in (reporting, died, signalled):
            task.cancel()
        http.should_exit = True
        await asyncio.wait({serving})
        await client.stop(STOP_ENGINE_S)
        service.close()
        sock.close()
        if config.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(config.uds)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _engine_died(service: Service, client: EngineClient) -> int:
    """Every stream of the client has ended in an error: let the requests write it, then end."""
    reason = client.state.dead or "The engine process ended."
    logger.error("%s", reason)
    await service.wait_idle(LAST_WORDS_S)
    if client.state.startup_failed:
        raise StartupError(reason)
    return EXIT_ENGINE_DIED


async def _drain(
    service: Service, client: EngineClient, signals: asyncio.Queue[str], first: str, timeout_s: float
) -> int:
    """Let running requests finish, at most `timeout_s` and until a second signal; then end the rest."""
    service.draining = True
    logger.info("%s: draining %d requests, at most %.0f s; a second signal ends them.", first, service.num_in_flight,
                timeout_s)  # fmt: skip
    idle = asyncio.ensure_future(service.wait_idle(timeout_s))
    again = asyncio.ensure_future(signals.get())
    died = asyncio.ensure_future(client.wait_dead())
    await asyncio.wait({idle, again, died}, return_when=asyncio.FIRST_COMPLETED)
    for task in (idle, again, died):
        task.cancel()
    if service.num_in_flight:
        logger.warning("%d requests are ended with an error.", service.num_in_flight)
    await client.stop(STOP_ENGINE_S)
    await service.wait_idle(LAST_WORDS_S)
    return EXIT_DRAINED


async def _report(service: Service, client: EngineClient, where: str) -> None:
    """Say when the engine is ready; then one line every ten seconds in which there was something to do."""
    _settle_collector()  # while the engine loads: the first request after it is ready would wait for it
    with contextlib.suppress(EngineDead, StartupError):  # `serve` waits for that too, and answers it
        await show_loading(client.state)
        ready = await client.wait_ready()
        for line in ready.lines:
            logger.info("%s", line)
        logger.info("Saddle %s serves %s at %s, context %d tokens, %d KV blocks of %d tokens.", VERSION,
                    service.model_names[0], where, ready.max_model_len, ready.num_blocks, ready.block_size)  # fmt: skip
        then = client.stats
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            now = client.stats
            if now.num_steps != then.num_steps:
                logger.info("%s", report_line(then, now, REPORT_EVERY_S))
            then = now


def _settle_collector() -> None:
    """Collect what the start left behind, and seldom from here on."""
    gc.collect()
    gc.freeze()  # tokenizer, templates and schemas live for ever: no need to walk them again
    gc.set_threshold(*COLLECT_AFTER)


def report_line(then: EngineStats, now: EngineStats, seconds: float) -> str:
    """Throughput between two states of the engine, and the state of the later one."""
    queries = now.num_cache_queries - then.num_cache_queries
    hits = now.num_cache_hits - then.num_cache_hits
    used = now.num_blocks - now.num_free_blocks - now.num_cached_blocks
    return (
        f"prompt {(now.num_prompt_tokens - then.num_prompt_tokens) / seconds:.1f} tok/s, "
        f"generation {(now.num_generated_tokens - then.num_generated_tokens) / seconds:.1f} tok/s, "
        f"running {now.num_running}, waiting {now.num_waiting}, "
        f"KV usage {used / max(now.num_blocks, 1):.1%}, prefix hit rate {hits / max(queries, 1):.1%}"
    )
