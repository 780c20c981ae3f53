"""What it costs that a ladder lowers a page from its stored numbers, not from the original ones.

    python benchmarks/second_rounding.py --model DIR --name smollm2-135m \
        --out benchmarks/results/fidelity/second-rounding

Every step is done twice: from what the page stores (`PageCodec.recode`, as it is), and from the
16-bit numbers that it was sealed from, which only this script keeps.

errors  squared errors of keys, values, scores (less each query's mean, which a softmax does not
        see) and outputs, on a model's own keys, values and queries; means over layers
kl      KL to mlx-lm's own cache, through the real one, in nats per token; the difference has a 95 %
        bootstrap interval over blocks of 64 neighbouring positions, for this one rounding of
        these pages: how much chance there is in that, other pieces of text say (--offset)

Rows go to OUT/NAME.json as they come; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

import pagedkv
from pagedkv import KVShape, Precision
from pagedkv.cli.loading import load_model
from pagedkv.integrations.mlx_lm.treatments import choose_treatments
from pagedkv.sequence import layer_kv as layer_pages
from pagedkv.tiers import LayerPager
from pagedkv.tiers.codec.affine import codec_for
from pagedkv.tools.bench.result import describe_machine
from pagedkv.tools.evaluation import Text, built_in_text, cut
from pagedkv.tools.evaluation.bootstrap import paired_interval
from pagedkv.tools.evaluation.metrics import compare, log_probabilities

PAGE, SINKS, HOT, NEAR, CHUNK, BLOCK = 256, 64, 512, 1024, 256, 64
EVERY = 2
"""Errors are taken of every second layer."""
STEPS = {
    "auto": (
        *("K8V8>K4V4", "K8V4>K4V4", "K4V4>K2V2", "K8V4>K4V2", "K4V4>K4V2", "K4V2>K2V2"),
        *("fp16>K4V4", "K8V8>K4V4>K2V2", "K8V8>K3V3", "K4V4>K3V3", "K3V3>K2V2"),
    ),
    "none": ("K8V8>K4V4", "K4V4>K2V2", "K4V4>K3V3"),
}
"""By treatment."""
LADDERS = tuple(
    f"{near}:{NEAR},{far}"
    for near, far in (("K8V8", "K4V4"), ("K4V4", "K2V2"), ("K4V4", "K3V3"), ("K3V3", "K2V2"))
)

Row = dict[str, Any]


# Errors of numbers


@dataclass(frozen=True)
class Layer:
    """What a layer attends: float32 ``[heads, tokens, channels]`` as float16 holds it."""

    queries: mx.array
    keys: mx.array
    values: mx.array


def read_layers(model: Any, tokens: list[int]) -> list[Layer]:
    """Keys and values of all whole pages of a text, and the queries of its last chunk."""
    module = sys.modules[type(model).__module__]
    real, seen = module.scaled_dot_product_attention, list[mx.array]()

    def attention(queries: mx.array, *rest: Any, **options: Any) -> mx.array:
        seen.append(queries)
        return real(queries, *rest, **options)

    caches = make_prompt_cache(model)
    module.scaled_dot_product_attention = attention
    try:
        for start in range(0, len(tokens), CHUNK):
            seen.clear()
            mx.eval(model.model(mx.array([tokens[start : start + CHUNK]]), cache=caches))
    finally:
        module.scaled_dot_product_attention = real
    end = SINKS + (len(tokens) - SINKS - CHUNK) // PAGE * PAGE
    kept = [
        (queries[0], *(x[0, :, SINKS:end] for x in cache.state[:2]))
        for queries, cache in zip(seen, caches, strict=True)
    ]
    return [Layer(*(x.astype(mx.float16).astype(mx.float32) for x in each)) for each in kept]


def errors_of(layer: Layer, keys: mx.array, values: mx.array) -> list[float]:
    """Of what pages give back: keys, scores, values, outputs."""
    heads, _, dim = layer.keys.shape
    queries = layer.queries.reshape(heads, -1, dim) * dim**-0.5
    scores, got = (queries @ x.swapaxes(1, 2) for x in (layer.keys, keys))
    off = got - scores
    off = off - off.mean(axis=-1, keepdims=True)
    weights = mx.softmax(scores, axis=-1)
    return [
        share(keys, layer.keys, layer.keys.mean(axis=1, keepdims=True)),
        float((off**2).mean().item()),
        share(values, layer.values, mx.array(0.0)),
        share(weights @ values, weights @ layer.values, mx.array(0.0)),
    ]


def share(got: mx.array, true: mx.array, middle: mx.array) -> float:
    """Squared error over what there is."""
    return float((((got - true) ** 2).sum() / ((true - middle) ** 2).sum()).item())


def given_back(codec: Any, records: mx.array) -> list[mx.array]:
    """Keys and values ``[heads, tokens, channels]``."""
    keys = codec.keys(records, mx.float32).transpose(1, 0, 3, 2)
    values = codec.values(records, mx.float32).transpose(1, 0, 2, 3)
    return [x.reshape(x.shape[0], -1, x.shape[-1]) for x in (keys, values)]


NAMES = ("keys", "scores", "values", "outputs")


def error_rows(model: Any, layers: list[Layer], step: str, treatment: str) -> list[Row]:
    """Errors of one step, from the stored numbers and from the originals."""
    precisions = [Precision.parse(name) for name in step.split(">")]
    ladder = ",".join(
        [f"{p}:{NEAR * (i + 1)}" for i, p in enumerate(precisions[:-1])] + [str(precisions[-1])]
    )
    config = pagedkv.TierConfig(kv=ladder, treatment=treatment)
    shapes = {
        i: KVShape(x.keys.shape[0], x.keys.shape[2], x.values.shape[2])
        for i, x in enumerate(layers)
    }
    treatments = choose_treatments(model, config, shapes)
    found: dict[str, list[list[float]]] = {"stored": [], "originals": []}
    for i, layer in enumerate(layers):
        if i % EVERY:
            continue
        codecs = [codec_for(shapes[i], PAGE, p, mx.float16, treatments.get(i)) for p in precisions]
        records = codecs[0].encode(layer.keys, layer.values)
        for old, new in itertools.pairwise(codecs):
            records = new.recode(records, old)
        found["stored"].append(errors_of(layer, *given_back(codecs[-1], records)))
        direct = codecs[-1].encode(layer.keys, layer.values)
        found["originals"].append(errors_of(layer, *given_back(codecs[-1], direct)))
    rows = []
    stored, originals = (np.array(found[source]) for source in found)
    for j, name in enumerate(NAMES):
        rows.append(
            {
                "part": "errors",
                "tokens": layers[0].keys.shape[1],
                "step": step,
                "treatment": treatment,
                "of": name,
                "stored": float(stored[:, j].mean()),
                "originals": float(originals[:, j].mean()),
                "ratio": float(stored[:, j].mean() / originals[:, j].mean()),
                "worst_layer": float((stored[:, j] / originals[:, j]).max()),
            }
        )
    return rows


# KL through the cache


Kept = dict[tuple[int, int], tuple[mx.array, mx.array]]
"""16-bit keys and values of pages, by layer and first position."""


@contextmanager
def originals(kept: Kept) -> Iterator[None]:
    """Pages are kept when they are sealed, and lowered from that; one sequence, no trims."""
    seal, lower = layer_pages.LayerPages._seal, LayerPager.lower

    def keeping(self: Any, first: int, count: int, precision: Precision) -> int:
        tokens = self._pager.page_tokens
        for i in range(count):
            start = self.sink_tokens + (first + i) * tokens
            numbers = [mx.contiguous(x[0]) for x in self._hot.view(start, start + tokens)]
            mx.eval(numbers)
            kept[self.layer, self._sealed_end() + i * tokens] = (numbers[0], numbers[1])
        return seal(self, first, count, precision)

    def from_kept(self: LayerPager, number: int, precision: Precision) -> int:
        old = self.pages[number]
        record = self.codecs[precision].encode(*kept[self.layer, old.position])
        self._pager.counters.lowered += 1
        return self._put(record, precision, old.position, old.lineage)

    layer_pages.LayerPages._seal, LayerPager.lower = keeping, from_kept
    try:
        yield
    finally:
        layer_pages.LayerPages._seal, LayerPager.lower = seal, lower


def kl_rows(model: Any, tokens: list[int], ladder: str) -> list[Row]:
    """The ladder both ways, and the difference."""
    config = pagedkv.TierConfig(
        kv=ladder,
        layer_kv="same",
        hot_tokens=HOT,
        sink_tokens=SINKS,
        page_tokens=PAGE,
        warm="2GB",
        cold=0,
    )
    caches, found = {}, {"stored": [], "originals": []}  # type: ignore[var-annotated]
    kept: Kept = {}
    own = make_prompt_cache(model)
    for source in found:
        caches[source] = pagedkv.wrap(model, config)
    for start in range(0, len(tokens) - 1, CHUNK):
        chunk, targets = tokens[start : start + CHUNK], tokens[start + 1 : start + CHUNK + 1]
        if alike := start + CHUNK <= SINKS + HOT + PAGE:  # nothing is in pages yet
            own_out = model.model(mx.array([chunk]), cache=own)
        else:
            own_out = log_probabilities(model(mx.array([chunk]), cache=own)[0])
        mx.eval(own_out)
        for source, cache in caches.items():
            with originals(kept) if source == "originals" else nullcontext():
                if alike:
                    mx.eval(model.model(mx.array([chunk]), cache=cache))
                    found[source].append(np.zeros(len(chunk)))
                    continue
                logits = model(mx.array([chunk]), cache=cache)[0]
                compared = compare(own_out, logits, mx.array(targets))
                mx.eval(compared.arrays)
            found[source].append(np.array(compared.kl))
        say(f"{ladder}: {start + len(chunk):,} tokens")
    beyond = SINKS + NEAR + PAGE  # from here on a page may have been lowered
    kl = {source: np.concatenate(parts)[beyond:] for source, parts in found.items()}
    blocks = [
        float((kl["stored"] - kl["originals"])[i : i + BLOCK].mean())
        for i in range(0, len(kl["stored"]) - BLOCK + 1, BLOCK)
    ]
    interval = paired_interval(blocks)
    stats = caches["stored"].stats()
    row = {
        "part": "kl",
        "ladder": ladder,
        "tokens": len(tokens) - 1,
        "first_position": beyond,
        "pages_sealed": stats.pages_sealed,
        "pages_lowered": stats.pages_lowered,
        "stored": float(kl["stored"].mean()),
        "originals": float(kl["originals"].mean()),
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }
    for cache in caches.values():
        cache.close()
    pagedkv.unwrap(model)
    return [row]


# Both


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--name", required=True, help="in the result")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--offset", type=int, default=0, help="tokens of the text left out before")
    parser.add_argument("--part", nargs="+", choices=("errors", "kl"), default=["errors", "kl"])
    parser.add_argument("--ladder", nargs="+", default=LADDERS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    path = args.out / f"{args.name}.json"
    result: dict[str, Any] = {"benchmark": "second rounding", "model": args.name, "rows": []}
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
    result["machine"] = describe_machine()
    model, tokenizer = load_model(args.model, "float32", say)
    text = Text.of("english", built_in_text("english"), tokenizer)
    result |= {"text": text.name, "digest": text.digest}
    tokens = list(cut(text, args.tokens, 1, args.offset)[0].tokens)

    def add(rows: list[Row]) -> None:
        for row in rows:
            say(json.dumps(row))
        result["rows"] += rows
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    names = ("part", "step", "treatment", "ladder", "offset")
    there = {tuple(row.get(name) for name in names) for row in result["rows"]}
    if "errors" in args.part:
        layers = read_layers(model, tokens[:-1])
        for treatment, step in ((t, step) for t, steps in STEPS.items() for step in steps):
            if ("errors", step, treatment, None, None) not in there:
                add(error_rows(model, layers, step, treatment))
    for ladder in args.ladder if "kl" in args.part else ():
        if ("kl", None, None, ladder, args.offset) not in there:
            add([{**row, "offset": args.offset} for row in kl_rows(model, tokens, ladder)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
