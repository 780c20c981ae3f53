"""A comparison from end to end: every text, leg and segment, with as many variants as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from pagedkv.errors import ConfigError
from pagedkv.integrations.mlx_lm.wrapping import unwrap, wrap
from pagedkv.tools.bench.caches import release
from pagedkv.tools.bench.result import Row, failed, first_words, skipped, succeeded
from pagedkv.tools.bench.timing import Deadline
from pagedkv.tools.evaluation.caches import Own, as_it_runs, hooked, opened
from pagedkv.tools.evaluation.copies import Copies
from pagedkv.tools.evaluation.legs import Leg, Reader
from pagedkv.tools.evaluation.metrics import Series
from pagedkv.tools.evaluation.result import Result
from pagedkv.tools.evaluation.settings import LEGS, PREFILL, EvalSettings
from pagedkv.tools.evaluation.slope import Floats, fit_slope
from pagedkv.tools.evaluation.texts import Segment, Text, cut
from pagedkv.tools.evaluation.variants import (
    REFERENCE,
    Variant,
    require_different,
    require_other_types,
    require_shorter,
)

BIN = 64
"""Positions whose KL a row tells as one number."""

SLACK = 1.5
"""Memory of a variant's caches, at most, over that of a 16-bit cache."""

TIME_IS_UP = "the time was up"

LOGITS_AT_ONCE = 8
"""Arrays of a call's logits in float32 that a comparison may need at a time."""

Say = Callable[[str], None]
Watch = Callable[[str, int, int], None]
"""Called with what is being done, tokens done, and tokens in all."""


@dataclass
class Evaluation:
    """What a comparison needs.

    Attributes:
        name: of the model, for rows.
        model: of mlx-lm, not wrapped.
        texts: to be read.
        variants: to be compared with the model's own cache.
        settings: lengths and legs.
        result: where rows go.
        deadline: a leg ends where it is when this passes, as its rows say; others are skipped.
        say: called with one line before each leg.
        watch: called as tokens are read.
    """

    name: str
    model: Any
    texts: Sequence[Text]
    variants: Sequence[Variant]
    settings: EvalSettings
    result: Result
    deadline: Deadline
    say: Say = lambda line: None
    watch: Watch = lambda label, done, total: None

    def run(self) -> None:
        """Run everything; a variant that fails is a failed row.

        Raises:
            ConfigError: if a text is too short, a label comes twice, the model's layers cannot be
                paged, nothing would be quantized, or a row is the reference itself.
            OSError: if the result cannot be written.
        """
        self._own, self._models = Own.of(self.model), Copies(self.model)
        self._require_sense()
        settings = self.settings
        pieces = [cut(t, settings.tokens, settings.segments, settings.offset) for t in self.texts]
        self._require_paging()
        self._runnable = [as_it_runs(variant, self.model) for variant in self.variants]
        self._reference = Variant(self._own.label)
        self._prefills: dict[tuple[str, int, str], Series] = {}
        for segments in pieces:
            for leg in sorted(settings.legs, key=LEGS.index):
                for segment in segments:
                    self._leg(leg, segment)
        self.result.write_positions()

    @property
    def beyond(self) -> int:
        """The first position of which some of the context may be quantized, for all rows alike."""
        return max((v.precise_tokens for v in self.variants), default=0)

    def _require_sense(self) -> None:
        require_different(self.variants)
        require_shorter(self.variants, self.settings.chunk)
        require_other_types(self.variants, self._own.label)
        if self.settings.tokens <= self.beyond:
            raise ConfigError(
                f"{self.settings.tokens:,} tokens all stay in 16 bit ({self.beyond:,} hot or "
                f"sinks): give more tokens, or fewer hot_tokens"
            )

    def _require_paging(self) -> None:
        ours = next((v.config for v in self.variants if v.config is not None), None)
        if ours is not None:
            wrap(self.model, ours).close()
            unwrap(self.model)

    def _leg(self, leg: str, segment: Segment) -> None:
        head: Row = {
            "model": self.name,
            "text": segment.text,
            "segment": segment.number,
            "leg": leg,
            "tokens": self.settings.tokens,
        }
        if self.result.has(head):
            return
        for first, group in self._groups():
            if self.deadline.passed:
                rows = [skipped(_row(head, v), TIME_IS_UP) for v in group]
            else:
                count = self.settings.segments
                which = f", segment {segment.number + 1} of {count}" if count > 1 else ""
                self.say(f"{leg}, {segment.text}{which}: {', '.join(v.label for v in group)}")
                rows = self._attempt(leg, segment, group, head)
            self.result.add(rows if first else rows[1:])  # the reference once
            release()

    def _groups(self) -> Iterator[tuple[bool, list[Variant]]]:
        """The reference with as many variants as fit in memory beside it, again and again."""
        settings = self.settings
        each = SLACK * self._own.token_bytes * settings.tokens
        logits = LOGITS_AT_ONCE * 4 * self._own.vocabulary * settings.chunk
        room = mx.get_memory_limit() - mx.get_active_memory() - logits - each
        most = max(1, int(room / max(1, each)))
        for start in range(0, max(1, len(self._runnable)), most):
            yield start == 0, [self._reference, *self._runnable[start : start + most]]

    def _attempt(
        self, leg: str, segment: Segment, group: Sequence[Variant], head: Row
    ) -> list[Row]:
        try:
            return self._measure(leg, segment, group, head)
        except Exception as e:  # the reference's: without it nothing can be said of the others
            note = f"the model does not run: {first_words(e)}"
            return [failed(_row(head, variant), note) for variant in group]

    def _measure(
        self, leg: str, segment: Segment, group: Sequence[Variant], head: Row
    ) -> list[Row]:
        total = self.settings.tokens
        rows: list[Row] = []
        with ExitStack() as stack:
            readers: list[Reader] = []
            for variant in group:
                model = self._models.of(variant.dtype)
                try:
                    caches = stack.enter_context(opened(variant, model))
                except ConfigError as e:
                    rows.append(failed(_row(head, variant), f"does not run: {first_words(e)}"))
                    continue
                readers.append(Reader(variant, model, caches))
            stack.enter_context(hooked())
            reference, *others = readers
            work = Leg(
                segment.tokens,
                reference,
                others,
                self.settings,
                lambda done: self.watch(f"{leg}, {segment.text}", done, total),
                self.deadline,
            )
            work.run(leg)
            if not work.losses:
                return [skipped(_row(head, v), TIME_IS_UP) for v in group]
            if work.reached < total:
                head = {**head, "tokens": work.reached, "cut_short": True}
            rows = [*(self._finished(leg, head, work, reader) for reader in readers), *rows]
        order = [variant.label for variant in group]
        return sorted(rows, key=lambda row: order.index(row["what"]))

    def _finished(self, leg: str, head: Row, work: Leg, reader: Reader) -> Row:
        row = _row(head, reader.variant)
        series = work.series(reader)
        if series is None or reader.footprint is None:
            return failed(row, f"does not run: {reader.error}")
        if not series.finite:
            return failed(row, f"not finite at {series.broken:,} of {series.kl.size:,} positions")
        row |= series.summary(self.beyond) | reader.footprint.to_dict()
        row["seconds"] = reader.seconds
        if reader.variant.kind == REFERENCE:
            return succeeded(row)
        place = (row["text"], row["segment"], row["what"])
        if leg == PREFILL:
            self._prefills[place] = series
        elif series.kl.size >= 2 * self.settings.block:
            row |= self._slope("slope", series.kl)
            prefill = self._prefills.get(place)
            if prefill is not None and (read := prefill.kl_beside(series)) is not None:
                row |= self._slope("added_slope", series.kl - read)
        if reader.footprint.pages == 0:
            row["note"] = "nothing was quantized: no page was full"
        if row.get("cut_short"):
            row["note"] = f"{TIME_IS_UP} after {row['tokens']:,} tokens"
        self.result.keep(row, series)
        return succeeded(row | {"kl_bin": BIN, "kl_binned": series.binned_kl(BIN)})

    def _slope(self, name: str, values: Floats) -> Row:
        settings = self.settings
        found = fit_slope(values, settings.seed, settings.block, settings.resamples)
        return {
            f"{name}_per_1000": 1000 * found.slope,
            f"{name}_per_1000_low": 1000 * found.low,
            f"{name}_per_1000_high": 1000 * found.high,
        }


def _row(head: Row, variant: Variant) -> Row:
    """What a row says of its variant."""
    config = variant.config
    return {
        **head,
        "what": variant.label,
        "kind": variant.kind,
        "kv": config.kv if config else None,
        "treatment": config.treatment if config else None,
        "precise_tokens": variant.precise_tokens,
        "note": variant.note,
    }
