"""A process that goes on with a flushed sequence until it is killed.

`killing` starts it (``python -m pagedkv.tools.stress.victim``), tells it on standard
input what to do, reads on its standard output what it is at, and kills it in the middle of that.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pagedkv.config.tier_config import TierConfig
from pagedkv.tools.stress.options import StressOptions
from pagedkv.tools.stress.sequence import append, open_cache
from pagedkv.tools.stress.tokens import History, SyntheticModel, SyntheticTokens


def main() -> None:
    """Resume, then append and flush, and say so, until killed."""
    spec: dict[str, Any] = json.load(sys.stdin)
    options = StressOptions(**spec["options"])
    tokens = SyntheticTokens(SyntheticModel(**spec["model"]), options)
    history = History(tuple((first, branch) for first, branch in spec["cuts"]))
    cache = open_cache(tokens.model.layers, TierConfig(**spec["config"]))
    cache.resume()
    _say("resumed", cache.offset)
    piece = max(1, options.chunk // 2)
    while True:
        start = cache.offset
        stop = min(start + piece, spec["stop"])
        for layer in cache.paged_layers if stop > start else ():
            append(tokens, layer, history, start, stop)
        _say("appended", cache.offset)
        _say("flushing", cache.offset)
        cache.flush()
        _say("flushed", cache.offset)


def _say(what: str, tokens: int) -> None:
    print(what, tokens, flush=True)


if __name__ == "__main__":
    main()
