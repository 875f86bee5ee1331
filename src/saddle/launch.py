"""The composition root: the only place that knows which parts make a server, and builds them.

    serve()          API process: tokenizer, renderer, engine client, service, HTTP application
      build_core()   engine process: runner, executor, scheduler, core

Each process imports what it runs and no more, inside its function: torch is loaded by the engine process alone, the
HTTP application by the API process alone. So the port opens in a fraction of a second.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from saddle.config import EngineConfig, ServerConfig
from saddle.engine.core import EngineCore
from saddle.engine.process import BuildCore
from saddle.engine.scheduler import Limits, Scheduler
from saddle.errors import StartupError
from saddle.executor.base import DeviceInfo, ProgressFn
from saddle.model.config import GenerationConfig
from saddle.model.source import resolve_model

if TYPE_CHECKING:
    from saddle.grammar.backend import XGrammarBackend
    from saddle.grammar.thinking import ThinkingBackend
    from saddle.parsing.render import Renderer
    from saddle.parsing.replay import ReplayStore
    from saddle.parsing.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
DEMO_NAME = "saddle-demo"
PIECE_CACHE_BYTES = 64 << 20


def demo_model_path() -> Path:
    """Folder of the bundled demo checkpoint."""
    return Path(__file__).parent / "demo_model"


def build_core(
    config: EngineConfig, folder: Path, on_progress: ProgressFn, *, with_grammars: bool = False
) -> tuple[EngineCore, DeviceInfo]:
    """Load the model of `folder` and return a core that takes requests, with what was found on the way.

    Args:
        with_grammars: offer structured output. Starts processes later, which an interactive caller may not want;
            limits of thinking are there without it.

    Raises:
        StartupError: it cannot start on this machine; the message says what would.
    """
    from saddle.executor.inproc import InprocExecutor
    from saddle.parsing.tokenizer import Tokenizer
    from saddle.runner.runner import Runner

    # Rows of the embedding that no token has are padding and must never be sampled.
    tokenizer = Tokenizer.load(tokenizer_folder(config, folder))
    executor = InprocExecutor(Runner(config, folder, tokenizer.vocab_size))
    info = executor.start(on_progress)
    limits = Limits(
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        policy=config.scheduler.policy,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        max_num_queued_reqs=config.scheduler.max_num_queued_reqs,
        max_step_s=None if info.max_step_ms is None else info.max_step_ms / 1000,
        yields_half=info.yields_half,
    )
    eos_ids = GenerationConfig.load(folder).eos_ids
    grammar = build_grammar(tokenizer, info.vocab_size, eos_ids, compiles=with_grammars)
    if with_grammars and info.max_step_ms is not None:
        # Where steps are to be short, a second of Python in another thread must not fall into the first of them.
        on_progress("loading structured output", 0.0, "")
        grammar.prepare()
    core = EngineCore(executor, Scheduler(limits, eos_ids), info.plans_in_flight, grammar)
    grammar.load_when_idle(lambda: core.has_work)
    return core, info


def build_grammar(
    tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int], after_s: float | None = None, compiles: bool = True
) -> ThinkingBackend:
    """Structured output for an engine; loads nothing yet, but after `after_s` seconds, or a few, by itself.

    Without `compiles` there are limits of thinking and no grammars.
    """
    from saddle.grammar.deferred import PREPARE_AFTER_S, DeferredBackend
    from saddle.grammar.thinking import ThinkingBackend

    def make() -> XGrammarBackend:
        from saddle.grammar.backend import XGrammarBackend

        return XGrammarBackend(tokenizer, vocab_size, eos_ids)

    grammars = DeferredBackend(make, PREPARE_AFTER_S if after_s is None else after_s) if compiles else None
    return ThinkingBackend(vocab_size, tokenizer.calls_id, grammars)


def tokenizer_folder(config: EngineConfig, folder: Path) -> Path:
    """Where the tokenizer lies: with the model, unless `--tokenizer` names another folder or hub id."""
    return resolve_model(config.load.tokenizer) if config.load.tokenizer else folder


def model_names(engine: EngineConfig, server: ServerConfig) -> tuple[str, ...]:
    """The names that requests may give; the first one is echoed."""
    if server.served_model_names:
        return server.served_model_names
    return (DEMO_NAME,) if engine.load.model == str(demo_model_path()) else (engine.load.model,)


def template_text(chat_template: str | None) -> str | None:
    """`--chat-template`: the path of a file, or the template itself."""
    if chat_template is None or "{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).read_text()
    except OSError as error:
        raise StartupError(f"--chat-template {chat_template}: {error.strerror or error}.") from None


def build_renderer(tokenizer: Tokenizer, chat_template: str | None, replay: ReplayStore) -> Renderer:
    """The renderer of a checkpoint: its own template, or the one asked for, or Saddle's."""
    from saddle.parsing.render import Renderer
    from saddle.parsing.tokenizer import CALLS

    template = template_text(chat_template) or tokenizer.chat_template
    if template is not None and CALLS not in template:
        whose = "--chat-template" if chat_template else "the checkpoint"
        logger.warning("The chat template of %s never writes %s: it is not one of MiniMax-M2, whose calls are read "
                       "between these tags alone, and a model that is shown another format may not call tools at all. "
                       "Without --chat-template the checkpoint's own is used.", whose, CALLS)  # fmt: skip
    return Renderer(tokenizer, template, tokenizer.model_identity, replay, PIECE_CACHE_BYTES)


def serve(engine: EngineConfig, server: ServerConfig, build: BuildCore | None = None) -> int:
    """Serve until a signal or the end of the engine; returns the exit code of the process.

    Args:
        build: what the engine process runs, for tests that put another device behind the server.

    Raises:
        StartupError: it cannot start; the message says what would.
    """
    from saddle.engine.client import EngineClient
    from saddle.metrics import Metrics
    from saddle.parsing.replay import ReplayStore
    from saddle.parsing.tokenizer import Tokenizer
    from saddle.server import serve as http
    from saddle.server.app import build_app
    from saddle.server.defaults import sampling_defaults
    from saddle.server.service import Service

    folder = resolve_model(engine.load.model, engine.load.revision, engine.load.download_dir)
    tokenizer = Tokenizer.load(tokenizer_folder(engine, folder))
    defaults = sampling_defaults(folder, server)
    replay = ReplayStore(server.replay_bytes)
    renderer = build_renderer(tokenizer, server.chat_template, replay)
    names = model_names(engine, server)
    sock = http.listen(server)

    async def main() -> int:
        client = await EngineClient.start(build or functools.partial(build_core, engine, folder, with_grammars=True))
        metrics = Metrics(names[0], vllm_names=server.vllm_metric_names)
        service = Service(
            client, tokenizer, renderer, replay, server, metrics, model_names=names, defaults=defaults,
            obeys_priority=engine.scheduler.policy == "priority",
        )  # fmt: skip
        return await http.serve(build_app(service, server), service, client, server, sock)

    return http.run(main())
