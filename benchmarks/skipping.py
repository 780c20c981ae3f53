"""What leaving cold pages out saves and costs, on a real model: bytes, KL and recall.

    python benchmarks/skipping.py --model demo --tokens 6000 --out benchmarks/results/skipping

Two tasks on English text: one needle (one record hidden in the text is asked for) and many records
(all of them, one after the other). The model is given the question and then the true answer token
by token; recall is the share of the answer's tokens that it would have chosen itself, KL is to the
same model reading every cold page, in nats per answer token. The prompt is read once and flushed;
every setting resumes it from disk. The oracle knows the true weights: of how many pages and layers
could a step do without, were the bound no bound but the truth?
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import pagedkv
from pagedkv.attn.driver import KVView
from pagedkv.cli.loading import load_model
from pagedkv.sequence import layer as layer_module

NAMES = [
    "Amber",
    "Basil",
    "Coral",
    "Daisy",
    "Ember",
    "Fern",
    "Ginger",
    "Hazel",
    "Iris",
    "Jasper",
    "Kelp",
    "Laurel",
]
SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "skip_below=1e-4": {"skip_below": 1e-4},
    "skip_below=1e-2": {"skip_below": 1e-2},
    "cold_pages=half": {"cold_pages": 0.5},
    "cold_pages=quarter": {"cold_pages": 0.25},
    "cold_pages=2": {"cold_pages": 2},
}
ORACLE_SHARE = 1e-4


def document(tokenizer: Any, tokens: int, seed: int) -> tuple[str, dict[str, int]]:
    """Text of about so many tokens, with a record for each name spread over it."""
    from pydoc_data.topics import topics

    rng = np.random.default_rng(seed)
    codes = {name: int(rng.integers(1000, 9999)) for name in NAMES}
    paragraphs = [p for key in sorted(topics) for p in topics[key].split("\n\n") if len(p) > 200]
    text, count = [], 0
    for paragraph in paragraphs:
        text.append(paragraph)
        count += len(tokenizer.encode(paragraph))
        if count > tokens:
            break
    for i, (name, code) in enumerate(codes.items()):
        at = (2 * i + 1) * len(text) // (2 * len(codes))
        text.insert(at, f"The secret code of {name} is {code}.")
    return "\n\n".join(text), codes


def tasks(codes: dict[str, int]) -> dict[str, tuple[str, str]]:
    """Question and answer of each."""
    name = NAMES[4]
    listed = ", ".join(f"{n} is {c}" for n, c in codes.items())
    return {
        "one needle": (f"\n\nThe secret code of {name} is", f" {codes[name]}."),
        "many records": ("\n\nAll secret codes:", f" {listed}."),
    }


def answer_logits(model: Any, cache: Any, question: list[int], answer: list[int]) -> np.ndarray:
    """What the model expects at each token of the answer: float32 ``[tokens, vocabulary]``."""
    rows = []
    for token in [*question, *answer[:-1]]:  # one at a time: steps that choose their pages
        out = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        rows.append(np.array(out))
    return np.stack(rows[len(question) - 1 :])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class Oracle:
    """Counts the pages that truly weigh next to nothing, for every head of a layer."""

    def __init__(self) -> None:
        self.pages = self.idle = 0

    def see(self, view: KVView, q: mx.array, scale: float) -> None:
        """Look at one step of one layer."""
        keys = view.dense(mx.float32)[0][0]
        heads, _, dim = keys.shape
        scores = (q.astype(mx.float32) * scale).reshape(heads, -1, dim) @ keys.swapaxes(1, 2)
        weights = np.array(mx.softmax(scores, axis=2)).reshape(-1, keys.shape[1])
        at, shares = view.sinks, []
        for entry in view.entries:
            shares.append(weights[:, at : at + entry.tokens].sum(axis=1))
            at += entry.tokens
        table = np.stack(shares)
        order = np.argsort(table.max(axis=1))
        sums = np.cumsum(table[order], axis=0).max(axis=1)
        self.pages += len(sums)
        self.idle += int((sums <= ORACLE_SHARE).sum())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every decode step meanwhile."""
        real = layer_module.attend

        def attend(view: KVView, q: mx.array, scale: float, *rest: Any) -> mx.array:
            if view.entries and q.shape[2] == 1:
                self.see(view, q, scale)
            return real(view, q, scale, *rest)

        layer_module.attend = attend
        try:
            yield
        finally:
            layer_module.attend = real


def measure(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    text, codes = document(tokenizer, args.tokens, args.seed)
    prompt = tokenizer.encode(text)
    rows: list[dict[str, Any]] = []
    oracle = Oracle()
    with tempfile.TemporaryDirectory(dir=args.cold_dir) as folder:
        config = pagedkv.TierConfig(
            layer_kv="same",
            warm=args.warm,
            cold="8GB",
            cold_dir=folder,
            bounds="1GB",
            page_tokens=256,
        )
        with pagedkv.wrap(model, config) as cache:
            for start in range(0, len(prompt), 512):
                mx.eval(model(mx.array([prompt[start : start + 512]]), cache=cache)[:, -1])
                say(f"read {min(start + 512, len(prompt)):,} of {len(prompt):,} tokens")
            pages = max(1, cache.stats().cold.pages // len(cache.paged_layers))
            cache.flush()
        pagedkv.unwrap(model)
        for task, (question, answer) in tasks(codes).items():
            ask, tell = tokenizer.encode(question), tokenizer.encode(answer)
            exact: np.ndarray | None = None
            for name, options in SETTINGS.items():
                chosen = dict(options)
                if isinstance(chosen.get("cold_pages"), float):
                    chosen["cold_pages"] = max(1, round(chosen["cold_pages"] * pages))
                with pagedkv.resume(model, replace(config, **chosen)) as cache:
                    # Pages that come from disk are unknown until they were read once.
                    answer_logits(model, cache, ask[:1], ask[1:2])
                    read = cache.stats().nvme_bytes_read
                    logits = answer_logits(model, cache, ask[1:], tell)
                    stats = cache.stats()
                pagedkv.unwrap(model)
                steps = len(ask) - 1 + len(tell) - 1
                logs = log_softmax(logits)
                exact = logs if exact is None else exact
                skipped = stats.skipped
                rows.append(
                    {
                        "task": task,
                        "setting": name,
                        "cold_pages_per_layer": pages,
                        "options": chosen,
                        "left_out": skipped.skipped_bytes / skipped.bytes if skipped else 0.0,
                        "bytes_per_token": (stats.nvme_bytes_read - read) / steps,
                        "kl": float((np.exp(exact) * (exact - logs)).sum(axis=1).mean()),
                        "recall": float((logits.argmax(axis=1) == np.array(tell)).mean()),
                        "weight_bound": skipped.weight_bound if skipped else 0.0,
                        "error_bound": skipped.error_bound if skipped else 0.0,
                    }
                )
                say(json.dumps(rows[-1]))
            with pagedkv.resume(model, config) as cache, oracle.watching():
                answer_logits(model, cache, ask[-1:], tell[:3])
            pagedkv.unwrap(model)
    return {
        "model": args.model,
        "tokens": len(prompt),
        "rows": rows,
        "oracle": {
            "share": ORACLE_SHARE,
            "pages": oracle.pages,
            "idle": oracle.idle,
        },
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--warm", default="5MB", help="little, so that most pages are cold")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cold-dir", help="where to put the cold pages")
    parser.add_argument("--out", type=Path, help="directory for NAME.json")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, "float32", say)
    result = measure(model, tokenizer, args)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = Path(args.model).name
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
