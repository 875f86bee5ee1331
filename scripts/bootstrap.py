"""Make `.venv` and install Saddle into it, with the torch that fits this machine. Standard library only.

    python3 scripts/bootstrap.py [--extras test,check] [--venv .venv]

Which torch, in this order:
    1. one with CUDA or ROCm imports already (a container, a cluster): the environment sees the system's packages
       and nothing is replaced;
    2. a GPU driver is here but no such torch: the newest torch from the package index;
    3. no GPU: the CPU build pinned in constraints/cpu.txt, from PyTorch's CPU index where that answers, else from
       the configured index. Several gigabytes of CUDA libraries are never wanted on such a machine.

A stamp file records what was installed from, so that a second run is instant.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_CONSTRAINTS = ROOT / "constraints" / "cpu.txt"
OLDEST, NEWEST = (3, 10), (3, 13)


def system_torch_has_gpu_build() -> bool:
    """Whether `import torch` of the running interpreter gives a CUDA or ROCm build."""
    probe = "import torch; print(torch.version.cuda or getattr(torch.version, 'hip', None) or '')"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() != ""


def has_gpu_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/kfd").exists()


def cpu_index_answers() -> bool:
    try:
        with urllib.request.urlopen(CPU_INDEX + "/torch/", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def pip(python: Path, *args: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args], check=True)


def install(target: Path, extras: str) -> None:
    reuse = system_torch_has_gpu_build()
    python = target / "bin" / "python"
    if not python.exists():
        venv.create(target, with_pip=True, system_site_packages=reuse)
    if reuse:
        print("torch: the GPU build that is installed already")
    elif has_gpu_driver():
        print("torch: newest from the package index (a GPU driver is present)")
    else:
        from_index = cpu_index_answers()
        print("torch: CPU build, " + (CPU_INDEX if from_index else "from the configured package index"))
        source = ["--index-url", CPU_INDEX] if from_index else []
        pip(python, *source, "-r", str(CPU_CONSTRAINTS))
    pip(python, "-e", f"{ROOT}[{extras}]" if extras else str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--extras", default="", help="optional dependency groups, comma separated")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    args = parser.parse_args()
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        print(f"Saddle needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]}, this is {sys.version.split()[0]}.")
        return 1
    wanted = (ROOT / "pyproject.toml").read_bytes() + CPU_CONSTRAINTS.read_bytes() + sys.version.encode()
    stamp = args.venv / f".saddle-{args.extras.replace(',', '-') or 'base'}"
    digest = hashlib.sha256(wanted).hexdigest()
    if not (stamp.exists() and stamp.read_text() == digest):
        print(f"installing into {args.venv} (once)", flush=True)
        install(args.venv, args.extras)
        stamp.write_text(digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
