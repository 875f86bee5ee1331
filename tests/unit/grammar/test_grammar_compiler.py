"""xgrammar is imported without torch and transformers where it can be, and with them where it cannot.

Each case is a process of its own: what a process has imported once it keeps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

USE = """
tokens = [bytes([n]) for n in range(256)]
info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=256, stop_token_ids=[0])
compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
made = compiler.compile_structural_tag('{"type": "structural_tag", "format": {"type": "const_string", "value": "ab"}}')
try:
    compiler.compile_structural_tag('{"type": "structural_tag", "format": {"type": "regex", "pattern": "("}}')
    refused = False
except Exception:
    refused = True
real = [name for name in ("torch", "transformers") if hasattr(sys.modules.get(name), "__file__")]
with open("/proc/self/statm") as pages:
    num_mib = int(pages.read().split()[1]) >> 8
"""
TELL = "\nprint(json.dumps([made.memory_size_bytes > 0, refused, real, num_mib]))"


def told_by(load: str, then: str = "") -> Any:
    code = f"import json, sys\nfrom saddle.grammar.compiler import load_xgrammar\n{load}{USE}{then}{TELL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_alone_it_needs_neither() -> None:
    *works, num_mib = told_by("xgrammar = load_xgrammar(alone=True)")
    assert works == [True, True, []]
    assert num_mib < 100, "262 MiB with both"


def test_beside_others_transformers_is_left_for_them() -> None:
    """Its place is free again, so that whoever imports it gets the real one."""
    load = "import torch\nxgrammar = load_xgrammar()\nassert 'transformers' not in sys.modules"
    *works, _ = told_by(load, "\nimport transformers\nassert transformers.__version__")
    assert works == [True, True, ["torch"]]


@pytest.mark.parametrize("alone", [True, False])
def test_stand_ins_that_do_not_do(alone: bool) -> None:
    load = ("from saddle.grammar import compiler\n"
            "def fail(self, name): raise AttributeError('there is no ' + name)\n"
            f"compiler.StandIn.__getattr__ = fail\nxgrammar = load_xgrammar(alone={alone})")  # fmt: skip
    *works, num_mib = told_by(load)
    assert works == [True, True, ["torch", "transformers"]]
    assert num_mib > 100
