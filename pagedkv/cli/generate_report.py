"""What `pagedkv generate` reports: speed, tiers, disk traffic and memory."""

from __future__ import annotations

from typing import Any

from pagedkv.attn.selection import SkipCounters
from pagedkv.cache.stats import CacheStats, TierStats
from pagedkv.cli.generation import Generation
from pagedkv.cli.output import Table, facts, number, rate, seconds
from pagedkv.config.sizes import format_size


def document(model: str, result: Generation) -> dict[str, Any]:
    """The result with raw numbers, for JSON."""
    read = max(result.prompt_tokens - 1, 0)
    return {
        "model": model,
        "text": result.text,
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "cached_tokens": result.cached_tokens,
        "finish_reason": result.finish_reason,
        "seconds": result.prefill_seconds + result.decode_seconds,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "tokens_per_second": result.decode_steps / result.decode_seconds,
        "prefill_tokens_per_second": read / result.prefill_seconds,
        "decode_steps": result.decode_steps,
        "nvme_bytes_read_in_decode": result.decode_bytes,
        "config": result.config.to_dict(),
        "stats": result.after.to_dict(),
    }


def tables(result: Generation) -> list[Table]:
    """The result for people."""
    s = result.after
    tiers = (("hot", s.hot), ("warm", s.warm), ("cold", s.cold))
    rows = [_tier_row(name, tier) for name, tier in tiers]
    pages, nbytes = (sum(getattr(t, n) for _, t in tiers) for n in ("pages", "bytes"))
    rows.append(["all", number(s.tokens), number(pages), format_size(nbytes), "", ""])
    rows.append(["fp16 cache", number(s.tokens), "", format_size(s.fp16_bytes), "", ""])
    headings = ("tier", "tokens", "pages", "bytes", "allocated", "budget")
    return [Table(headings, rows), facts(_facts(result))]


def _tier_row(name: str, tier: TierStats) -> list[str]:
    return [
        name,
        number(tier.tokens),
        number(tier.pages) if name != "hot" else "",
        format_size(tier.bytes),
        format_size(tier.allocated),
        format_size(tier.budget) if tier.budget else "",
    ]


def _facts(result: Generation) -> list[tuple[str, str]]:
    s = result.after
    memory = s.hot.allocated + s.warm.allocated + s.staging_bytes
    precisions = ", ".join(f"{n} {name}" for name, n in s.precisions.items()) or "none"
    return [
        (
            "cache memory",
            f"{format_size(memory)} (hot, warm, staging {format_size(s.staging_bytes)}), "
            f"an fp16 cache takes {format_size(s.fp16_bytes)}",
        ),
        ("pages", f"{precisions}; {s.bits_per_element:.2f} bits per number, hot tokens included"),
        ("NVMe", _traffic(result)),
        ("the disk allows", ceiling(s)),
        ("read-ahead", _read_ahead(s)),
        *([("left out", _left_out(s.skipped))] if s.skipped else []),
        *([("memory pressure", _pressure(s))] if s.pages_demoted_for_pressure else []),
        ("speed", _speed(result)),
        (
            "process",
            f"{format_size(s.process_bytes)} resident; MLX {format_size(s.mlx_active_bytes)} "
            f"active, {format_size(s.mlx_peak_bytes)} peak, {format_size(s.mlx_cache_bytes)} kept",
        ),
        ("layers", _layers(s.layers)),
        ("precision", _layers(s.ladders)),
        ("treatment", _treatments(s.treatments)),
    ]


def _traffic(result: Generation) -> str:
    s, per_step = result.after, result.decode_bytes / result.decode_steps
    return (
        f"{format_size(s.nvme_bytes_written)} written, {format_size(s.nvme_bytes_read)} read; "
        f"{format_size(result.decode_bytes)} of that in decoding, {format_size(per_step)} per token"
    )


def ceiling(s: CacheStats) -> str:
    """The most tokens a second that reading the cold pages allows, beside what was reached."""
    if s.nvme_steps_per_second is None:
        return "any speed: nothing is cold" if not s.cold.bytes else "nothing was read yet"
    return (
        f"at most {s.nvme_steps_per_second:,.1f} steps/s at this length: each reads "
        f"{format_size(s.nvme_bytes_per_step)}, the disk gave {rate(round(s.nvme_read_rate), 1)}; "
        f"reached {s.steps_per_second:,.1f}/s"
    )


def _pressure(s: CacheStats) -> str:
    return (
        f"{s.memory_pressure}; {number(s.pages_demoted_for_pressure)} pages went to disk early, "
        f"{format_size(s.warm_bytes_returned)} given back"
    )


def _read_ahead(s: CacheStats) -> str:
    batches = s.read_ahead_hits + s.read_ahead_misses
    if not batches:
        return "nothing was read"
    return (
        f"{number(s.read_ahead_hits)} hits, {number(s.read_ahead_misses)} misses "
        f"({s.read_ahead_hits / batches:.0%}); waited {seconds(s.read_stall_seconds)} for reads, "
        f"{seconds(s.write_stall_seconds)} for writes"
    )


def _left_out(skipped: SkipCounters) -> str:
    share = skipped.skipped_bytes / skipped.bytes if skipped.bytes else 0.0
    return (
        f"{share:.1%} of the cold bytes ({number(skipped.skipped_pages)} of "
        f"{number(skipped.pages)} pages); no head missed more than {skipped.weight_bound:.1e} of "
        f"its attention in a step, no output number more than {skipped.error_bound:.1e}"
    )


def _speed(result: Generation) -> str:
    read = result.prompt_tokens - 1
    parts = []
    if read > 0:
        speed = read / result.prefill_seconds
        parts.append(
            f"prefill {number(read)} tokens in {seconds(result.prefill_seconds)} ({speed:,.1f}/s)"
        )
    speed = result.decode_steps / result.decode_seconds
    parts.append(
        f"decode {number(result.decode_steps)} steps in {seconds(result.decode_seconds)} "
        f"({speed:,.1f}/s)"
    )
    return ", ".join(parts)


def _treatments(told: tuple[str, ...]) -> str:
    """What is done, without each layer's own reason."""
    return _layers(tuple(text.partition(":")[0] for text in told))


def _layers(kinds: tuple[str, ...]) -> str:
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return ", ".join(f"{n} {kind}" for kind, n in counts.items())
