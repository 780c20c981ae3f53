"""The command line: ``pagedkv generate | plan | doctor | stress``.

One module per command, each with ``add_parser`` and a ``run`` that returns the exit code. What
takes long to import (mlx-lm, tokenizers) is imported by the command that needs it.
"""
