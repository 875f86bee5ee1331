"""Coding agents as their users run them: how each is installed, pointed at a server, and asked to run one command.

Versions are pinned: npm would choose the newest that the machine's Node allows, and agents change what they send.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("SADDLE_CLIENTS", ROOT / ".clients"))
MODEL = "MiniMax-M2"
PROMPT = "run echo"
LIMIT_S = 120.0


@dataclass(frozen=True)
class Agent:
    """One agent.

    package      on npm, with its version
    binary       its command below node_modules/.bin
    arguments    of the command
    environment  added to an otherwise empty one; `{url}` is the server's address
    files        written below the scratch home: path -> text, `{url}` likewise
    after        a script of the package that npm may not run by itself
    path         of the API that it talks to
    """

    package: str
    binary: str
    arguments: tuple[str, ...]
    path: str
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    after: str | None = None

    @property
    def command(self) -> Path:
        return FOLDER / "node_modules" / ".bin" / self.binary

    def run(self, home: Path, url: str) -> subprocess.CompletedProcess[str]:
        """Run it headless in an empty home and an empty environment."""
        for name, text in self.files.items():
            target = home / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text.replace("{url}", url))
        work = home / "work"
        work.mkdir(exist_ok=True)
        for name in ("opencode.json",):
            if (home / name).exists():
                shutil.copy(home / name, work / name)
        environment = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb"}
        environment |= {name: value.replace("{url}", url) for name, value in self.environment.items()}
        return subprocess.run([str(self.command), *self.arguments], cwd=work, env=environment, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S)  # fmt: skip


CLAUDE = {
    "ANTHROPIC_BASE_URL": "{url}", "ANTHROPIC_AUTH_TOKEN": "dummy", "ANTHROPIC_MODEL": MODEL,
    "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
}  # fmt: skip
CLAUDE_ARGUMENTS = ("-p", PROMPT, "--output-format", "stream-json", "--verbose", "--allowedTools", "Bash(echo:*)")
CLAUDE_PACKAGE = "@anthropic-ai/claude-code@2.1.197"
CODEX_CONFIG = f"""model = "{MODEL}"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "{{url}}/v1"
env_key = "LOCAL_API_KEY"
wire_api = "responses"
"""
PI_MODEL = {
    "id": MODEL, "name": MODEL, "reasoning": True, "input": ["text"], "contextWindow": 196608, "maxTokens": 8192,
    "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
}  # fmt: skip
PI_PROVIDER = {"baseUrl": "{url}/v1", "api": "openai-completions", "apiKey": "dummy", "models": [PI_MODEL]}
PI_CONFIG = {"providers": {"local": PI_PROVIDER}}
OPENCODE_MODEL = {"reasoning": True, "tool_call": True, "limit": {"context": 196608, "output": 8192}}
OPENCODE_CONFIG = {
    "autoupdate": False, "share": "disabled", "model": f"local/{MODEL}", "small_model": f"local/{MODEL}",
    "permission": {"bash": "allow"},
    "provider": {"local": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": "{url}/v1", "apiKey": "dummy"},
                           "models": {MODEL: OPENCODE_MODEL}}},
}  # fmt: skip

AGENTS = {
    "pi": Agent("@earendil-works/pi-coding-agent@0.74.2", "pi", ("--provider", "local", "--model", MODEL, "-p", PROMPT),
                "/v1/chat/completions", files={".pi/agent/models.json": json.dumps(PI_CONFIG)}),
    "codex": Agent("@openai/codex@0.169.0", "codex",
                   ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json", PROMPT),
                   "/v1/responses", {"LOCAL_API_KEY": "dummy"}, {".codex/config.toml": CODEX_CONFIG}),
    "claude-bare": Agent(CLAUDE_PACKAGE, "claude", ("--bare", *CLAUDE_ARGUMENTS), "/v1/messages", CLAUDE,
                         after="@anthropic-ai/claude-code/install.cjs"),
    "claude-full": Agent(CLAUDE_PACKAGE, "claude", CLAUDE_ARGUMENTS, "/v1/messages", CLAUDE,
                         after="@anthropic-ai/claude-code/install.cjs"),
    "opencode": Agent("opencode-ai@1.18.33", "opencode", ("run", "--format", "json", PROMPT), "/v1/chat/completions",
                      {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1",
                       "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"},
                      {"opencode.json": json.dumps(OPENCODE_CONFIG)}, "opencode-ai/postinstall.mjs"),
    "qwen-code": Agent("@qwen-code/qwen-code@0.15.10", "qwen", ("--auth-type", "openai", "-y", "-p", PROMPT),
                       "/v1/chat/completions",
                       {"OPENAI_API_KEY": "dummy", "OPENAI_BASE_URL": "{url}/v1", "OPENAI_MODEL": MODEL}),
}  # fmt: skip


def install(agent: Agent, say: Callable[[str], None]) -> str | None:
    """Install one agent from npm below `FOLDER`; returns why it cannot be, if so."""
    if agent.command.exists():
        return None
    npm = shutil.which("npm")
    if npm is None:
        return "there is no npm on this machine"
    say(f"installing {agent.package} into {FOLDER}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--no-audit", "--no-fund", "--no-save", "--prefix", str(FOLDER)]
    wanted = sorted({one.package for one in AGENTS.values() if one.command.exists()} | {agent.package})
    done = subprocess.run([*command, *wanted], text=True, capture_output=True, timeout=1200)
    if done.returncode != 0 or not agent.command.exists():
        return f"npm install {agent.package} failed: {(done.stderr or done.stdout)[-400:]}"
    if agent.after is not None:
        subprocess.run(["node", str(FOLDER / "node_modules" / agent.after)], capture_output=True, timeout=300)
    return None
