"""Fills a page of documentation from result files: a table and the figures for each part."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.tools.bench.plots import draw
from pagedkv.tools.bench.report import COLUMNS, markdown, yardstick_line
from pagedkv.tools.bench.result import Row, read_result

_FIGURES = {"attention": ("attention-", "speed-"), "decode": ("decode-",), "prefill": ("prefill-",)}


def fill_page(page: Path, results: Sequence[Path]) -> list[str]:
    """Write tables, figures and the machine of some results into a page.

    What lies between ``<!-- bench:PART -->`` and ``<!-- /bench:PART -->`` is replaced, for each
    part that the results have rows of; the rest stays. Figures are drawn beside the result files.

    Args:
        page: a Markdown file.
        results: files of `Result`, of one machine or several.

    Returns:
        The parts that were filled.

    Raises:
        ConfigError: if a file cannot be read or is no result, or the page has no place for a part.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read the page {str(page)!r}: {e.strerror}") from e
    documents = [(path, read_result(path)) for path in results]
    filled = []
    for part in COLUMNS:
        pieces = [_piece(part, path, document, page) for path, document in documents]
        body = "\n\n".join(piece for piece in pieces if piece)
        if body:
            text = replace_section(text, part, body)
            filled.append(part)
    page.write_text(text, encoding="utf-8")
    return filled


def replace_section(text: str, part: str, body: str) -> str:
    """The text with a part's section replaced.

    Raises:
        ConfigError: if there is no such section.
    """
    start, end = f"<!-- bench:{part} -->", f"<!-- /bench:{part} -->"
    section = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not section.search(text):
        raise ConfigError(f"the page has no section for {part}: add {start} and {end}")
    return section.sub(lambda _: f"{start}\n\n{body}\n\n{end}", text)


def _piece(part: str, path: Path, document: dict[str, Any], page: Path) -> str:
    """One result's share of a section; empty if it has no row of the part."""
    rows: list[Row] = document["rows"]
    table = markdown(part, rows)
    if not table:
        return ""
    mine = [row for row in rows if row["part"] == part]
    figures = [
        f"![{file.stem}]({_link(file, page)})"
        for file in draw(mine, path.parent)
        if file.name.startswith(_FIGURES.get(part, ()))
    ]
    source = f"{machine_line(document)} Raw rows: [{path.name}]({_link(path, page)})."
    return "\n\n".join([source, f"Yardsticks: {yardstick_line(mine)}.", table, *figures])


def machine_line(document: dict[str, Any]) -> str:
    """Machine, versions and date of a result in a sentence."""
    machine = document["machine"]
    versions = f"MLX {machine['mlx']}, mlx-lm {machine['mlx_lm']}, pagedkv {machine['pagedkv']}"
    return f"{machine['device']} ({machine['backend']}), {versions}, {document['date'][:10]}."


def _link(file: Path, page: Path) -> str:
    relative = os.path.relpath(file.resolve(), page.resolve().parent)
    return Path(relative).as_posix()
