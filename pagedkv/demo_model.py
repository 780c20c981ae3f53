"""The former name of `pagedkv.tools.demo.demo_model`, for scripts that know no other."""

from pagedkv.tools.demo.demo_model import ensure_demo_model

__all__ = ["ensure_demo_model"]
