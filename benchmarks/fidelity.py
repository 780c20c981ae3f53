r"""The campaign behind docs/fidelity.md: what every precision does to what real models expect.

    python benchmarks/fidelity.py --part all --model smollm2-135m=DIR --model qwen2.5-0.5b=DIR \
        --out benchmarks/results/fidelity --seconds 280
    python benchmarks/fidelity.py --part page --out benchmarks/results/fidelity

A part of a model is DIR/MODEL-PART.json, with its tables in Markdown and its plots beside it:

prefill    all precisions, some ladders and mlx-lm's quantized cache, both texts read in chunks
decode     some of them, token by token after a prompt, with the slope of KL by position, and of
           what that adds to the same positions read in chunks
segments   some of them over several pieces of the English text, for the spread
retrieval  facts hidden in a text and asked for (docs/retrieval.md), 90 cells a model
records    likewise, several records to be written as JSON, 30 cells a model

Rows called "same" have no layer with more bits than others (`TierConfig.layer_kv`).

Parts run the most important first, each for all models; --seconds is for all of them together,
models included: a leg that is under way then ends where it is, and its rows say so. Started again
it goes on; legs that are complete, and cells that were run, are not measured again. `page` needs no
GPU and nothing but the JSON files: it prints the tables again and draws the plots.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pagedkv import TierConfig
from pagedkv.cli.eval import record
from pagedkv.cli.loading import MODELS_OWN, load_model
from pagedkv.errors import ConfigError, PagedKVError
from pagedkv.tools.bench.result import SKIPPED
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation import (
    BUILT_IN,
    LEGS,
    PREFILL,
    EvalSettings,
    Evaluation,
    Result,
    Text,
    again_variants,
    built_in_text,
    heat_map,
    mlx_lm_variants,
    paged_variants,
    read_result,
)
from pagedkv.tools.evaluation.plots import HINT, available, draw
from pagedkv.tools.evaluation.report import page
from pagedkv.tools.evaluation.result import RETRIEVAL
from pagedkv.tools.evaluation.retrieval_result import Grid, RetrievalResult
from pagedkv.tools.evaluation.retrieval_rows import Retrieval
from pagedkv.tools.evaluation.variants import PRECISIONS

LONG_LADDER = "fp16:512,K8V4:8192,K4V4:65536,K4V2"
LADDERS = ("K8V4:2048,K4V4", "fp16:1024,K8V4:4096,K4V2", "K4V4:2048,K2V2")
FEWER_BITS = "K8V4,K4V8,K4V4,K4V2,K3V3,K2V2"
MLX_LM = (8, 4)
K = 1024
FACT_ROWS = ("fp16", "K4V4", LADDERS[0], LONG_LADDER)
LENGTHS = (
    (K, 2 * K, 4 * K, 8 * K, 12 * K, 16 * K),
    (K, 2 * K, 3 * K, 4 * K, 5 * K, 7 * K),
)


Opened = tuple[Any, Any, Callable[[str], Text]]
"""A model, its tokenizer, and the built-in texts as its tokens."""


@dataclass(frozen=True)
class Part:
    """What one part measures.

    Attributes:
        legs: of the comparison.
        kv: rows of ours, as `pagedkv eval --kv` takes them.
        bits: rows of mlx-lm's quantized cache.
        texts: that are read.
        segments: of each.
        same: more rows of ours, with all layers alike.
        again: tokens per call of mlx-lm's own cache once more: how much is chance.
    """

    legs: tuple[str, ...]
    kv: tuple[str, ...]
    bits: tuple[int, ...] = ()
    texts: tuple[str, ...] = BUILT_IN
    segments: int = 1
    same: tuple[str, ...] = ()
    again: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Cells:
    """Retrieval tasks.

    Attributes:
        kv: rows of ours.
        tasks: the most important first.
        lengths: of prompts; a model gets the first ones that it was made for.
        again: tokens per call of mlx-lm's own cache once more, and types that it is computed in:
            how much is chance.
        examples: of each task, length and depth.
        same: more rows of ours, with all layers alike.
    """

    kv: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[tuple[int, ...], ...]
    again: tuple[int | str, ...] = (512, 1024, "float32")
    examples: int = 1
    same: tuple[str, ...] = ()

    def grid(self, lengths: tuple[int, ...], seed: int) -> Grid:
        """The cells; the text is read in the chunks that mlx-lm reads prompts in."""
        return Grid(self.tasks, lengths, examples=self.examples, seed=seed)

    def lengths_of(self, model: Any) -> tuple[int, ...]:
        """What a model was made for."""
        limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
        fitting = [some for some in self.lengths if limit is None or max(some) <= limit]
        return (fitting or self.lengths[-1:])[0]


PARTS: dict[str, Part | Cells] = {
    "prefill": Part(
        (PREFILL,),
        (",".join(PRECISIONS), *LADDERS),
        MLX_LM,
        same=(FEWER_BITS, *LADDERS),
        again=(128,),
    ),
    "decode": Part(LEGS, ("K4V4", LADDERS[0]), same=("K4V4",)),
    "segments": Part(
        (PREFILL,), ("K8V4,K4V4,K4V2,K3V3,K2V2",), MLX_LM, BUILT_IN[:1], 4, same=("K4V4",)
    ),
    "retrieval": Cells(FACT_ROWS, ("needle", "multikey", "kv"), LENGTHS, same=("K4V4",)),
    "records": Cells(FACT_ROWS, ("records",), LENGTHS, same=("K4V4",)),
}
"""The most important first."""


def settings(part: Part, args: argparse.Namespace) -> EvalSettings:
    return EvalSettings(
        tokens=args.tokens,
        chunk=args.chunk,
        legs=part.legs,
        decode_tokens=args.decode_tokens,
        decode_step=args.decode_step,
        segments=part.segments,
        seed=args.seed,
    )


def complete(path: Path, part: Part | Cells, args: argparse.Namespace) -> bool:
    """Whether a part was measured to its end, and in the same way."""
    if not path.exists():
        return False
    document = read_result(path)
    if isinstance(part, Cells):
        told = document["settings"][RETRIEVAL]
        lengths = tuple(told["lengths"])
        same = lengths in part.lengths and to_json(part.grid(lengths, args.seed)) == told
        return same and document.get(RETRIEVAL, {}).get("complete", False)
    chosen = settings(part, args)
    same = {**document["settings"], **to_json(chosen)} == document["settings"]
    rows = document["rows"]
    return same and not any(row["status"] == SKIPPED or row.get("cut_short") for row in rows)


def to_json(chosen: EvalSettings | Grid) -> dict[str, Any]:
    """Settings as they come back from a file: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.to_dict().items()}


def measure(
    name: str,
    part: str,
    opener: Callable[[], Opened],
    args: argparse.Namespace,
    deadline: Deadline,
) -> None:
    """Measure one part of one model, unless it is there already."""
    plan, path = PARTS[part], args.out / f"{name}-{part}.json"
    if complete(path, plan, args):
        say(f"{path}: measured before")
        return
    model, tokenizer, text_of = opener()
    base = TierConfig(page_tokens=args.page_tokens)
    variants = paged_variants(plan.kv, base)
    variants += paged_variants(plan.same, base, layer_kvs=("same",)) if plan.same else []
    variants = again_variants(plan.again) + variants
    if isinstance(plan, Cells):
        grid = plan.grid(plan.lengths_of(model), args.seed)
        head = record(name, model, None, variants, [], command(args), grid)
        result = resumed(head, path)
        Retrieval(model, tokenizer, variants, grid, result, deadline, say).run()
    else:
        chosen = settings(plan, args)
        variants += mlx_lm_variants(plan.bits)
        texts = list(map(text_of, plan.texts))
        head = record(name, model, chosen, variants, texts, command(args))
        result = resumed(head, path)
        Evaluation(name, model, texts, variants, chosen, result, deadline, say).run()
    report(path)


def resumed(head: dict[str, Any], path: Path) -> Result:
    """A result that goes on where an earlier run's file ends."""
    result = Result(head, path.parent, path.name)
    if before := result.resume():
        say(f"{path}: going on after {before} rows")
    return result


def report(path: Path) -> None:
    """Print a part's tables, and write them and its plots beside it."""
    document = read_result(path)
    tables = page(document)
    path.with_suffix(".md").write_text(tables, encoding="utf-8")
    print(f"\n{path.stem}\n\n{tables}", flush=True)
    draw(document["rows"], path.with_suffix(""))
    if RETRIEVAL in document:
        heat_map.draw(RetrievalResult.from_dict(document[RETRIEVAL]), path.with_suffix(""))


def command(args: argparse.Namespace) -> str:
    """How this was started; where models lie is nobody's business."""
    words = [f"{w.partition('=')[0]}=DIR" if w in args.model else w for w in args.argv]
    return shlex.join(["python", "benchmarks/fidelity.py", *words])


def named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--model {text!r}: write NAME=FOLDER, as in smollm2-135m=models/smollm2")
    return name, path


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", required=True, nargs="+", choices=(*PARTS, "all", "page"))
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, help="stop where it is after this long")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--decode-tokens", type=int, default=2048)
    parser.add_argument("--decode-step", type=int, default=1, help="tokens per call of decode")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--page-tokens", type=int, help="256, 512 or 1024 (default: chosen)")
    parser.add_argument("--dtype", default=MODELS_OWN, help="default: that of the weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    deadline = Deadline(args.seconds)
    chosen = [part for part in PARTS if part in args.part or "all" in args.part]

    @cache
    def opened(path: str) -> Opened:
        model, tokenizer = load_model(path, args.dtype, say)
        return model, tokenizer, cache(lambda text: Text.of(text, built_in_text(text), tokenizer))

    code = 0
    try:
        models = dict(map(named, args.model))
    except PagedKVError as e:
        parser().error(str(e))
    for part in chosen:
        for name, path in models.items():
            try:
                measure(name, part, lambda path=path: opened(path), args, deadline)
            except (PagedKVError, OSError) as e:  # one part's; the others go on
                print(f"error: {name}, {part}: {e}", file=sys.stderr)
                code = 1
    if "page" in args.part:
        for path in sorted(args.out.glob("*.json")):
            report(path)
    if not available():
        say(HINT)
    return code


if __name__ == "__main__":
    sys.exit(main())
