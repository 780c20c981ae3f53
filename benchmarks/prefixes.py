"""Time to the first token after a restart: a prompt whose beginning an earlier process flushed.

    python benchmarks/prefixes.py --tokens 4096 --rounds 5

One process computes a prompt of Python's manual and flushes it. Then, in turns, fresh processes get
the same prompt with another question at its end, with and without reuse, and say how long the first
token took, the model being loaded; and how much was reused and read, which tells why.
One JSON line per process, then the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any


def first_token(args: argparse.Namespace) -> dict[str, Any]:
    """Compute or reuse the prompt and give the first token; what it took."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    import pagedkv
    from pagedkv.cli.loading import load_model
    from pagedkv.cli.output import Notes
    from pagedkv.tools.demo.demo_text import demo_document

    model, tokenizer = load_model(args.model, "auto", Notes(quiet=True))
    text = demo_document(args.tokens, lambda part: len(tokenizer.encode(part)))
    document = tokenizer.encode(text)[: args.tokens]
    question = tokenizer.encode(f"\n\nQuestion {args.question}: what is said of closures?\n")
    config = pagedkv.TierConfig(cold_dir=args.cold_dir, kv=args.kv)
    with pagedkv.wrap(model, config) as cache:
        mx.eval(model.parameters())
        prompt = [*document, *question]
        started = time.perf_counter()
        reused = cache.reuse(prompt) if args.step == "reuse" else 0
        step = args.prefill_step_size
        tokens = generate_step(
            mx.array(prompt[reused:]), model, prompt_cache=cache, prefill_step_size=step
        )
        token = int(next(tokens)[0])
        seconds = time.perf_counter() - started
        if args.step == "write":
            cache.remember(prompt)
            cache.flush()
        stats = cache.stats()
    return {
        "step": args.step,
        "tokens": len(prompt),
        "reused": reused,
        "seconds": seconds,
        "token": token,
        "bytes_read": stats.nvme_bytes_read,
        "read_mb_per_s": stats.nvme_read_rate / 1e6,
    }


def _again(step: str, question: int, cold_dir: str, given: list[str]) -> dict[str, Any]:
    """The same program as a fresh process."""
    own = ["--step", step, "--question", str(question), "--cold-dir", cold_dir]
    command = [sys.executable, __file__, *given, *own]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(done.stdout.strip(), flush=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kv", default="K4V4")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill-step-size", type=int, default=512)
    parser.add_argument("--step", choices=("write", "reuse", "compute"))
    parser.add_argument("--question", type=int, default=0)
    parser.add_argument("--cold-dir")
    parser.add_argument("--where", help="folder for the cold files; the system's temporary one")
    args = parser.parse_args()
    if args.step:
        print(json.dumps(first_token(args)))
        return
    given = [f"--model={args.model}", f"--kv={args.kv}", f"--tokens={args.tokens}"]
    given.append(f"--prefill-step-size={args.prefill_step_size}")
    with tempfile.TemporaryDirectory(prefix="pagedkv-", dir=args.where) as cold:
        _again("write", 0, cold, given)
        rows = [
            _again(step, question, cold, given)
            for question in range(1, args.rounds + 1)
            for step in (("reuse", "compute") if question % 2 else ("compute", "reuse"))
        ]
    median = {
        step: statistics.median(r["seconds"] for r in rows if r["step"] == step)
        for step in ("reuse", "compute")
    }
    same = sum(a["token"] == b["token"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    print(json.dumps({**median, "ratio": median["reuse"] / median["compute"], "same_token": same}))


if __name__ == "__main__":
    main()
