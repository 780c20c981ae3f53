"""What quantized pages do to a model's answers: KL, perplexity and top-1 beside its own cache."""

from pagedkv.tools.evaluation.metrics import SCOPES, Comparison, Series, log_probabilities
from pagedkv.tools.evaluation.result import Result, read_result
from pagedkv.tools.evaluation.run import Evaluation
from pagedkv.tools.evaluation.settings import DECODE, LEGS, PREFILL, EvalSettings
from pagedkv.tools.evaluation.slope import Slope, fit_slope
from pagedkv.tools.evaluation.texts import BUILT_IN, Segment, Text, built_in_text, cut
from pagedkv.tools.evaluation.variants import (
    Variant,
    again_variants,
    mlx_lm_variants,
    paged_variants,
)

__all__ = [
    "BUILT_IN",
    "DECODE",
    "LEGS",
    "PREFILL",
    "SCOPES",
    "Comparison",
    "EvalSettings",
    "Evaluation",
    "Result",
    "Segment",
    "Series",
    "Slope",
    "Text",
    "Variant",
    "again_variants",
    "built_in_text",
    "cut",
    "fit_slope",
    "log_probabilities",
    "mlx_lm_variants",
    "paged_variants",
    "read_result",
]
