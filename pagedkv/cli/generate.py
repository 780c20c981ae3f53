"""``pagedkv generate``: text from a model whose context lies in three tiers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pagedkv.cache.paged_cache import PagedCache
from pagedkv.cache.persistence import snapshot as state
from pagedkv.cli.generate_report import document, tables
from pagedkv.cli.generation import Generation, Sampling, generate
from pagedkv.cli.loading import (
    add_model_options,
    load_model,
    prompt_tokens,
    read_prompt,
    wrapped,
)
from pagedkv.cli.options import (
    add_mlx_lm_options,
    add_tier_options,
    finite,
    parse_tokens,
    positive,
    seed,
    tier_config,
    user_path,
)
from pagedkv.cli.output import (
    Notes,
    add_output_options,
    emit,
    write_json,
)
from pagedkv.config.planner import require_room
from pagedkv.config.tier_config import TierConfig
from pagedkv.errors import ConfigError, PagedKVError
from pagedkv.integrations.mlx_lm.wrapping import load, resume, unwrap
from pagedkv.sequence.partial_layer import PartialLayerCache

_EPILOG = """\
examples:
  pagedkv generate --model demo --prompt "What is a page table?"
  pagedkv generate --model ./my-model --prompt-file book.txt --warm 64MB --cold 4GB
  pagedkv generate --model owner/name --prompt - < notes.txt --format json
  pagedkv generate --model demo --demo-document 6000 --warm 16MB --cold 1GB

The answer goes to standard output as text; --format adds a report, or gives both as JSON or CSV.

Read a document once, and ask about it as often as you like:
  pagedkv generate --model demo --prompt-file manual.txt --max-tokens 1 --save-cache doc.safetensors
  pagedkv generate --model demo --prompt-cache-file doc.safetensors --prompt "What is a closure?"

The same without a second copy, where the pages are:
  pagedkv generate --model demo --prompt-file manual.txt --cold-dir ./cold
  pagedkv generate --model demo --prompt "What is a closure?" --cold-dir ./cold --resume

Prompts that begin like one of those in ./cold are not computed again as far as they are alike:
  cat manual.txt question1.txt | pagedkv generate --model demo --prompt - --cold-dir ./cold
  cat manual.txt question2.txt | pagedkv generate --model demo --prompt - --cold-dir ./cold
"""
_LEAST_TEMP = 1e-9
"""Below it, logits over the temperature overflow float32."""

_MOST_DEMO = 2**24


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "generate",
        help="generate text with a paged cache, and say where its tokens went",
        description="Generate text with a context that may be larger than memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    group = parser.add_argument_group("prompt")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the prompt; - reads standard input")
    source.add_argument("--prompt-file", metavar="FILE", help="a text file; - is standard input")
    source.add_argument(
        "--demo-document",
        metavar="TOKENS",
        help="ask about a note hidden in that many tokens of Python's manual",
    )
    group.add_argument(
        "--no-chat-template",
        "--ignore-chat-template",
        action="store_true",
        help="give the prompt to the model as it is",
    )
    group.add_argument("--prompt-cache-file", metavar="FILE", help="go on from a saved cache")
    group.add_argument(
        "--resume",
        metavar="SEQUENCE",
        nargs="?",
        const="",
        help="go on from what an earlier call left in --cold-dir: the last one, or the one named",
    )
    group.add_argument(
        "--no-prefix-reuse",
        action="store_true",
        help="compute all of the prompt, whatever --cold-dir has of it",
    )
    _add_sampling_options(parser)
    add_tier_options(parser)
    add_mlx_lm_options(parser)
    add_output_options(parser, "the answer alone; table: a report after it")
    parser.add_argument("--save-cache", metavar="FILE", help="save the cache at the end")
    parser.add_argument("--stats-json", metavar="FILE", help="write the cache's numbers to a file")
    parser.set_defaults(run=run)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="at most (default: 256)"
    )
    group.add_argument(
        "--temp", type=finite, default=0.0, help="temperature; 0 is greedy (default: 0)"
    )
    group.add_argument("--top-p", type=finite, default=1.0, help="nucleus (default: 1, off)")
    group.add_argument("--seed", type=seed, default=0, help="of the sampler (default: 0)")
    group.add_argument(
        "--prefill-step-size",
        type=int,
        metavar="N",
        help="tokens per prefill chunk (default: 2048; 512 on a CPU)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    say, form = Notes(args.quiet), args.format
    config = _check(args)
    text = None if args.demo_document else _prompt(args)
    model, tokenizer = load_model(args.model, args.dtype, say)
    if text is None:
        text = _demo_prompt(args, tokenizer, say)
    with _cache(args, model, config, say) as cache:
        template = not args.no_chat_template
        prompt = prompt_tokens(tokenizer, text, template, continued=cache.offset > 0)
        _require_room(cache, len(prompt))
        fresh = cache.offset == 0  # else nobody knows which tokens it holds
        rest = _unknown(cache, prompt, say) if fresh and not args.no_prefix_reuse else prompt
        if len(rest) > 512:
            say(f"reading a prompt of {len(rest):,} tokens")
        sampling = Sampling(
            args.max_tokens, args.temp, args.top_p, args.seed, args.prefill_step_size
        )
        stream = form in (None, "table")
        result = generate(model, tokenizer, cache, rest, sampling, stream, args.quiet)
        _end_at_answer(cache, result)
        if args.save_cache:
            cache.save(str(user_path(args.save_cache)))
        if fresh and config.cold_dir is not None:
            cache.remember([*prompt, *result.token_ids])
        problem = _flush(cache, say)
    full = document(args.model, result)
    if args.stats_json:
        numbers = {name: value for name, value in full.items() if name not in ("text", "stats")}
        write_json(
            str(user_path(args.stats_json)), {**result.after.to_dict(), "generation": numbers}
        )
    if not stream:
        emit(form, full, [])
    elif form and not args.quiet:
        print()
        emit(form, full, tables(result))
    if problem:
        raise problem  # only now: the answer is there all the same
    return 0


# Before the model is loaded


def _check(args: argparse.Namespace) -> TierConfig:
    """Refuse what cannot work while that costs nothing; the tiers that are asked for."""
    positive(args.max_tokens, "--max-tokens")
    if args.prefill_step_size is not None:
        positive(args.prefill_step_size, "--prefill-step-size")
    if args.temp < 0 or not 0 < args.top_p <= 1:
        raise ConfigError(
            f"--temp is from 0 up and --top-p above 0 and up to 1, got {args.temp} and {args.top_p}"
        )
    if 0 < args.temp < _LEAST_TEMP:
        raise ConfigError(f"--temp {args.temp} is too near to 0 to divide by: 0 is greedy")
    if args.demo_document is not None:
        _demo_tokens(args)
    for flag in ("save_cache", "stats_json"):
        path = getattr(args, flag)
        if path and not user_path(path).parent.is_dir():
            raise ConfigError(f"--{flag.replace('_', '-')} {path!r}: there is no such directory")
        if path and user_path(path).is_dir():
            raise ConfigError(f"--{flag.replace('_', '-')} {path!r} is a directory: name a file")
    if args.save_cache and Path(args.save_cache).suffix != ".safetensors":
        raise ConfigError(
            f"--save-cache {args.save_cache!r}: the file is of the safetensors format, and its "
            f"name must end in .safetensors"
        )
    saved = _saved(args)
    if args.resume is not None and (saved or not args.cold_dir):
        raise ConfigError(
            "--resume goes on from what lies in --cold-dir: give that, and no --prompt-cache-file"
        )
    return tier_config(args, saved_config(str(saved)) if saved and saved.exists() else None)


def _saved(args: argparse.Namespace) -> Path | None:
    """The file of a saved cache to go on from, if one was named."""
    return None if args.prompt_cache_file is None else user_path(args.prompt_cache_file)


def _prompt(args: argparse.Namespace) -> str:
    return (
        read_prompt(None, "-") if args.prompt == "-" else read_prompt(args.prompt, args.prompt_file)
    )


def _demo_prompt(args: argparse.Namespace, tokenizer: Any, say: Notes) -> str:
    """A document that fits in none of the upper tiers, and a question about it."""
    from pagedkv.tools.demo.demo_text import DEMO_QUESTION, demo_document

    text = demo_document(_demo_tokens(args), lambda part: len(tokenizer.encode(part)))
    tokens = len(tokenizer.encode(text))
    say(f"{tokens:,} tokens of Python's manual, with a note planted in the first third")
    say(DEMO_QUESTION)
    return f"{text}\n\n{DEMO_QUESTION}"


def _demo_tokens(args: argparse.Namespace) -> int:
    tokens = positive(parse_tokens(args.demo_document, "demo-document"), "--demo-document")
    if tokens > _MOST_DEMO:
        raise ConfigError(f"--demo-document is {_MOST_DEMO:,} tokens at most, got {tokens:,}")
    return tokens


# The cache


@contextmanager
def _cache(
    args: argparse.Namespace, model: Any, config: TierConfig, say: Notes
) -> Iterator[PagedCache]:
    """The saved cache if there is one, else an empty one."""
    saved = _saved(args)
    if args.resume is not None:
        try:
            with resume(model, config, sequence=args.resume or None) as cache:
                say(f"going on from {cache.offset:,} tokens in {config.cold_dir}")
                yield cache
        finally:
            unwrap(model)
        return
    if saved is None or not saved.exists():
        if saved is not None:
            say(f"there is no {saved} yet: beginning with an empty cache")
        with wrapped(model, config) as cache:
            yield cache
        return
    try:
        with load(str(saved), model, config) as cache:
            say(f"going on from {cache.offset:,} tokens in {saved}")
            yield cache
    finally:
        unwrap(model)


def saved_config(path: str) -> TierConfig:
    """The tiers that a saved cache was made with.

    Raises:
        CacheStateError: if it is not a saved paged cache.
    """
    states = state.load_states(path)
    return state.saved_config(state.parse_meta(states[0] if states else {}))


def _require_room(cache: PagedCache, prompt: int) -> None:
    """Refuse a prompt that the budgets cannot hold before reading the first half of it."""
    shapes = {layer.shape for layer in cache.paged_layers}
    shape = shapes.pop() if len(shapes) == 1 else None
    if shape is not None:  # else its layers differ, and the cache says so when it is full
        layers = cache.paged_layers
        config, tokens = cache.context.settled, cache.offset + prompt
        windows = [layer.reach for layer in layers if isinstance(layer, PartialLayerCache)]
        if config.max_kv_size is not None:
            windows = [n for n in windows if n != config.max_kv_size]  # known from the config
        require_room(shape, len(layers), tokens, config, windows)


def _unknown(cache: PagedCache, prompt: list[int], say: Notes) -> list[int]:
    """Begin with what the cold directory has of a prompt; the rest of it."""
    if reused := cache.reuse(prompt):
        say(f"{reused:,} of the prompt's {len(prompt):,} tokens are there already")
    return prompt[reused:]


def _end_at_answer(cache: PagedCache, result: Generation) -> None:
    """Keep what there is up to the end of the answer's text, so that a next turn can follow."""
    answer = result.tokens - (result.finish_reason == "stop")
    cache.trim(max(0, cache.offset - result.cached_tokens - result.prompt_tokens - answer))


def _flush(cache: PagedCache, say: Notes) -> PagedKVError | None:
    """Leave the sequence in the cold directory if there is one; what went wrong."""
    config = cache.context.config
    if config.cold_dir is None or not cache.context.pager.has_cold:
        return None
    if not cache.is_fully_paged:
        say("nothing stays in the cold directory: not all layers of this model are paged")
        return None
    try:
        kept = cache.flush()
    except PagedKVError as e:
        return e
    say(f"{kept.tokens:,} tokens stay in {config.cold_dir}: go on with --resume {kept.sequence}")
    return None
