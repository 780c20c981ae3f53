"""Looks at the package's files: rooms, imports of every kind, private names, public names.

python -m tests.structure writes docs/structure.md and tests/public_names.json anew.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "structure.md"
NAMES = Path(__file__).with_name("public_names.json")
FLOORS = ("pagedkv", "tiers", "allocator")

INTRODUCTION = """\
# Structure

A line per file, from its own first line: `python -m tests.structure` writes this page, and a test
sees that it is current. Imports point down: `cli`, `tools`, `integrations`, `cache` and `sequence`,
`calibration` and `attn`, `config`, `tiers`, `allocator`; import-linter holds that. `allocator/` and
`tiers/` are at the top level and are imported as `pagedkv.allocator` and `pagedkv.tiers`.
`tests/test_structure.py` counts what is still to become fewer: files on an import circle (imports
inside functions and for types alone count), private attributes of other objects, long files.
"""


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found: dict[str, Path] = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[0] == "pagedkv" and parts[1:2] in (("tiers",), ("allocator",)):
                continue  # the links
            name = ".".join(parts if parts[0] == "pagedkv" else ("pagedkv", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports anywhere; of packages, what they hold under that name."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            out |= {each if each in known else node.module for each in inner}
    return (out & known.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of files that import each other, in whatever way (Tarjan's components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = set()
            while node not in group:
                group.add(stack.pop())
            if len(group) > 1:
                found.append(group)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def foreign_privates(path: Path) -> list[str]:
    """Places where a file touches a private attribute of something else than itself."""
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Attribute) and node.attr.startswith("_")):
            continue
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        parent = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
        if not (own or parent or node.attr.endswith("__")):
            out.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.attr}")
    return out


def options() -> dict[str, list[str]]:
    """The options of each command."""
    from pagedkv.cli.main import build_parser

    commands = next(
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return {
        name: sorted(option for action in parser._actions for option in action.option_strings)
        for name, parser in commands.choices.items()
    }


def public() -> dict[str, Any]:
    """What users can name: exported names, methods of caches, and options."""
    import pagedkv

    methods = sorted(name for name in dir(pagedkv.PagedCache) if not name.startswith("_"))
    return {"names": sorted(pagedkv.__all__), "PagedCache": methods, "options": options()}


def document() -> str:
    """The whole of docs/structure.md."""
    return INTRODUCTION + "".join(_lines())


def _lines() -> Iterator[str]:
    room = None
    for path in sorted(files().values(), key=lambda path: (path.parent, path.name)):
        place = path.relative_to(ROOT)
        told = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        if place.parent != room:
            room = place.parent
            package = room / "__init__.py"
            sentence = ast.get_docstring(ast.parse((ROOT / package).read_text())) or ""
            yield f"\n## {room}/\n\n{sentence.partition(chr(10))[0]}\n\n"
        if path.name != "__init__.py":
            yield f"- `{path.name}`: {told}\n"


def main() -> None:
    """Write what is written."""
    DOCUMENT.write_text(document())
    NAMES.write_text(json.dumps(public(), indent=1) + "\n")


if __name__ == "__main__":
    main()
