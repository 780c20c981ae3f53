"""What `pagedkv stress` is made of: long contexts under fixed budgets, with known answers.

`SyntheticStress` drives the cache alone with tokens that are regenerated from a seed
(`pagedkv.tools.stress.tokens`), so that every answer (`exact`) and every stored number (`verify`,
`tolerance`) is known; `ModelStress` drives a real model beside itself with everything in memory.
Between prefill chunks come the `operations`; `killing` kills a `victim`, a process of its own.
`memory` and `faults` watch what is taken and what the disk does; a `StressReport` says what came
of it, and `plots` draws it.
"""

from pagedkv.tools.stress.checks import Check
from pagedkv.tools.stress.exact import ExactSoftmax, Truth
from pagedkv.tools.stress.model import ModelStress
from pagedkv.tools.stress.options import OPERATIONS, StressOptions, parse_ops, schedule
from pagedkv.tools.stress.report import Status, StressReport, Watch
from pagedkv.tools.stress.synthetic import SyntheticStress
from pagedkv.tools.stress.tokens import History, SyntheticModel, SyntheticTokens

__all__ = [
    "OPERATIONS",
    "Check",
    "ExactSoftmax",
    "History",
    "ModelStress",
    "Status",
    "StressOptions",
    "StressReport",
    "SyntheticModel",
    "SyntheticStress",
    "SyntheticTokens",
    "Truth",
    "Watch",
    "parse_ops",
    "schedule",
]
