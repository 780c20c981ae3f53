"""Benchmarks: attention, decode and prefill beside MLX's and mlx-lm's own; and the disk.

The physics first. A decode step reads every cached key and value once, and every weight: its
floor is bytes over bandwidth. A K4V4 page has 4.5 bits per number where fp16 has 16, so attention
that is bound by bytes could be 3.56 times faster; a short context is bound by launching kernels
instead. So every row stands beside its roofline: the bytes that it must read over the copy
bandwidth that was measured in the same run.

Speed is a ratio within one run: everything that is compared takes turns. `Campaign` runs a list of
`Task`s into a `Result`; `report`, `plots` and `page` turn rows into tables, figures and
documentation.
"""

from pagedkv.tools.bench.campaign import Campaign, Task, plan_tasks
from pagedkv.tools.bench.result import Result, Row, describe_machine, read_result
from pagedkv.tools.bench.settings import DEPTHS, PARTS, STREAMING, AttentionShape, BenchSettings
from pagedkv.tools.bench.subject import WIDTHS, LlamaShape, Subject, random_llama
from pagedkv.tools.bench.timing import Deadline, Sample

__all__ = [
    "DEPTHS",
    "PARTS",
    "STREAMING",
    "WIDTHS",
    "AttentionShape",
    "BenchSettings",
    "Campaign",
    "Deadline",
    "LlamaShape",
    "Result",
    "Row",
    "Sample",
    "Subject",
    "Task",
    "describe_machine",
    "plan_tasks",
    "random_llama",
    "read_result",
]
