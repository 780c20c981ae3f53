"""Runs the suite's core with the oldest declared releases of MLX and mlx-lm, and with the newest.

They are laid over the environment that runs this, each pair in a folder of its own beside it. Where
one of them is what that environment has anyway, `make unit` has run everything with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from pagedkv.integrations import releases

ROOT = Path(__file__).parent.parent
CORE = (
    "attention",
    "batch",
    "cli_generate",
    "door",
    "fallbacks",
    "mlx_lm",
    "server",
    "store",
    "streams",
)
BACKEND = "mlx-metal" if sys.platform == "darwin" else "mlx-cpu"
SHOW = "from importlib.metadata import version as v; print(v('mlx'), v('mlx-lm'))"


def run(name: str, mlx: str, mlx_lm: str) -> None:
    """Install two releases and run the core with them.

    Args:
        name: of the folder.
        mlx: which release, as pip wants it.
        mlx_lm: which release.
    """
    folder = ROOT / f".venv-{name}"
    requirements = [f"mlx{mlx}", f"{BACKEND}{mlx}", f"mlx-lm{mlx_lm}"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--upgrade", "--target", str(folder)]
    subprocess.run([*pip, *requirements], check=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    found = subprocess.run(
        [sys.executable, "-c", SHOW], env=env, check=True, capture_output=True, text=True
    )
    here = f"{version('mlx')} {version('mlx-lm')}"
    print(f"{name}: mlx and mlx-lm {found.stdout.strip()}; this environment has {here}", flush=True)
    if found.stdout.strip() == here:
        return
    files = [f"tests/test_{part}.py" for part in CORE]
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"]
    subprocess.run([*pytest, *files], env=env, cwd=ROOT, check=True)


if __name__ == "__main__":
    run("oldest", f"=={releases.MLX}", f"=={releases.MLX_LM}")
    run("newest", f">={releases.MLX}", f">={releases.MLX_LM},<{releases.NEXT_MLX_LM}")
