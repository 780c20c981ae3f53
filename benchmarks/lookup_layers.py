"""Which layers a fact is lost in: pages of some layers only, and how far the answer moves.

    python benchmarks/lookup_layers.py --model DIR --facts kv:4096:100:4 multikey:3072:50:2 \
        --out benchmarks/results/lookup-layers.json

A prompt is read once with mlx-lm's own cache. What pages would hold of it is then rounded in some
layers and left alone in others, and the same answer is asked again: KL of its tokens, and the root
mean square change of their margins. Layers are in the order of how much they look things up when a
text is read twice: what a query's second reading attends to beyond the first (sums of p², as in
`pagedkv/calibration/moments.py`). That heads which retrieve show it is from RazorAttention
(arXiv:2407.15891).

echo    the layers in that order, with their sums
alone   K4V4 in one layer, of keys or of values
rows    precisions of all layers, or of the first layers in that order and of all others
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import KVCache

from pagedkv import KVShape, Precision, TierConfig, unwrap, wrap
from pagedkv.cli.loading import MODELS_OWN, load_model
from pagedkv.integrations.mlx_lm.recording import measure
from pagedkv.tiers import Treatment
from pagedkv.tiers.codec.affine import codec_for
from pagedkv.tools.bench.result import describe_machine
from pagedkv.tools.evaluation import built_in_text
from pagedkv.tools.evaluation.caches import own_caches
from pagedkv.tools.evaluation.prompts import Example, build
from pagedkv.tools.evaluation.retrieval import read_tokens

CHUNK, PAGE, HOT, SINKS = 2048, 256, 512, 64
FIRST_PAGES = 2816
"""Tokens after which every layer has its treatment."""

ECHO = 512
"""Tokens that are read twice."""

Row = dict[str, Any]
Floats = npt.NDArray[np.float64]


def echo(model: Any, tokens: Sequence[int]) -> Floats:
    """What each layer looks up when a text is read a second time."""
    once, twice = (measure(model, [text], lambda *done: None) for text in (tokens, [*tokens] * 2))
    return np.array([twice[n].seen.attention.sum() - once[n].seen.attention.sum() for n in once])


class Fact:
    """A prompt, its answer, and keys and values of all layers as they are and as pages hold them.

    Attributes:
        text: the answer with mlx-lm's own cache.
    """

    def __init__(self, model: Any, tokenizer: Any, example: Example) -> None:
        self._model = model
        prompt = example.tokens[: example.question_at]
        treatments = self._treatments(prompt[:FIRST_PAGES])
        caches = own_caches(model)
        read_tokens(model, caches, prompt, CHUNK)
        self._exact = [
            (cache.keys[:, :, : len(prompt)], cache.values[:, :, : len(prompt)]) for cache in caches
        ]
        mx.eval(self._exact)
        self._pages: dict[str, list[tuple[mx.array, mx.array]]] = {}
        self._treated = treatments
        question = list(example.tokens[example.question_at :])
        ids = self._answer(question, tokenizer, example)
        self.text = str(tokenizer.decode(ids))
        self._tokens, self._ids = question + ids[:-1], ids
        self._log = self._predictions(self._exact)
        self._margins = self._ahead(self._log)

    def _treatments(self, tokens: Sequence[int]) -> list[Treatment | None]:
        alike = TierConfig(kv="K4V4", layer_kv="same", hot_tokens=HOT, sink_tokens=SINKS)
        with wrap(self._model, alike) as cache:
            read_tokens(self._model, list(cache), tokens, CHUNK)
            found = [layer.treatment for layer in cache.paged_layers]
        unwrap(self._model)
        return found

    def _answer(self, question: list[int], tokenizer: Any, example: Example) -> list[int]:
        caches, ids = self._caches(self._exact), list[int]()
        logits = self._model(mx.array([question]), cache=caches)
        while True:
            ids.append(int(mx.argmax(logits[0, -1]).item()))
            ended = ids[-1] in tokenizer.eos_token_ids or len(ids) == example.max_new_tokens
            if ended or example.judge.finished(tokenizer.decode(ids)):
                return ids
            logits = self._model(mx.array([ids[-1:]]), cache=caches)

    @staticmethod
    def _caches(held: Sequence[tuple[mx.array, mx.array]]) -> list[KVCache]:
        caches = [KVCache() for _ in held]
        for cache, (keys, values) in zip(caches, held, strict=True):
            cache.update_and_fetch(keys, values)
        return caches

    def _predictions(self, held: Sequence[tuple[mx.array, mx.array]]) -> Floats:
        logits = self._model(mx.array([self._tokens]), cache=self._caches(held))
        logits = logits[0, -len(self._ids) :].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)

    def _ahead(self, log: Floats) -> Floats:
        """How far the answer's tokens are ahead of all others."""
        own = log[np.arange(len(self._ids)), self._ids]
        others = log.copy()
        others[np.arange(len(self._ids)), self._ids] = -np.inf
        return np.asarray(own - others.max(axis=1))

    def held(self, precision: str, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values of a layer, with what pages would hold rounded."""
        if precision not in self._pages:
            self._pages[precision] = [
                self._rounded(*arrays, treatment, Precision.parse(precision))
                for arrays, treatment in zip(self._exact, self._treated, strict=True)
            ]
        return self._pages[precision][layer]

    def _rounded(
        self,
        keys: mx.array,
        values: mx.array,
        treatment: Treatment | None,
        precision: Precision,
    ) -> tuple[mx.array, mx.array]:
        heads, tokens, key_dim = keys.shape[1:]
        shape = KVShape(heads, key_dim, values.shape[3])
        end = SINKS + (tokens - SINKS - HOT) // PAGE * PAGE
        codec = codec_for(shape, PAGE, precision, mx.float16, treatment)
        records = codec.encode(keys[0, :, SINKS:end], values[0, :, SINKS:end])
        k = codec.keys(records, mx.float32).transpose(1, 0, 3, 2).reshape(heads, -1, key_dim)
        v = codec.values(records, mx.float32).swapaxes(0, 1).reshape(heads, -1, shape.value_dim)
        joined = [
            mx.concatenate([x[:, :, :SINKS], page[None].astype(x.dtype), x[:, :, end:]], axis=2)
            for x, page in ((keys, k), (values, v))
        ]
        mx.eval(joined)
        return joined[0], joined[1]

    def moved(self, keys: dict[int, str], values: dict[int, str]) -> Row:
        """What becomes of the answer.

        Args:
            keys: precision of layers whose keys are rounded.
            values: likewise.
        """
        held = [
            (
                self.held(keys[n], n)[0] if n in keys else exact[0],
                self.held(values[n], n)[1] if n in values else exact[1],
            )
            for n, exact in enumerate(self._exact)
        ]
        log = self._predictions(held)
        kl = (np.exp(self._log) * (self._log - log)).sum(axis=1).mean()
        change = self._ahead(log) - self._margins
        return {"kl": float(kl), "margin_rms": float(np.sqrt(np.mean(change**2)))}


def rows_of(fact: Fact, order: Sequence[int]) -> Iterator[Row]:
    layers = len(order)
    for what in ("keys", "values"):
        for n in range(layers):
            only, none = {n: "K4V4"}, dict[int, str]()
            moved = fact.moved(*((only, none) if what == "keys" else (none, only)))
            yield {"part": "alone", "what": what, "layer": n, **moved}
    plans = [(each, "", 0) for each in ("K8V8", "K8V4", "K4V8", "K4V4", "K3V3")]
    plans += [("K4V4", "", count) for count in (layers // 10, layers // 6, layers // 4)]
    plans += [("K4V4", "K3V3", layers // 10), ("K4V4", "K3V3", layers // 6)]
    for most, least, count in plans:
        chosen = dict.fromkeys(range(layers), most)
        # Each layer with 8 bits is paid for by four with 3.
        chosen |= dict.fromkeys(order[layers - 4 * count :] if least else (), least)
        chosen |= dict.fromkeys(order[:count], "K8V8")
        bits = [Precision.parse(p) for p in chosen.values()]
        mean = np.mean([(p.key_bits + p.value_bits) / 2 for p in bits]) + 0.5
        row = {"part": "rows", "all": most, "first": count, "last": least or None}
        yield {**row, "bits": float(mean), **fact.moved(chosen, chosen)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--dtype", default=MODELS_OWN)
    parser.add_argument("--facts", nargs="+", required=True, metavar="TASK:TOKENS:DEPTH:SEED")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.dtype, lambda line: None)
    text = tokenizer.encode(built_in_text("english"))[2000 : 2000 + ECHO]
    sums = echo(model, text)
    order = [int(n) for n in np.argsort(-sums)]
    rows: list[Row] = [{"part": "echo", "layer": n, "sum": float(sums[n])} for n in order]
    for given in args.facts:
        task, tokens, depth, seed = given.split(":")
        example = build(task, tokenizer, int(tokens), int(depth), int(seed), False)
        fact = Fact(model, tokenizer, example)
        for row in rows_of(fact, order):
            rows.append({"fact": given, "answer": fact.text, **row})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        document = {"machine": describe_machine(), "model": Path(args.model).name, "rows": rows}
        args.out.write_text(json.dumps(document, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
