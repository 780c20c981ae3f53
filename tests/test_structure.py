"""Rooms, imports and names: what a stranger relies on to find his way. Numbers may only fall."""

from __future__ import annotations

import json

from tests import structure

ON_A_CIRCLE = 13
FOREIGN_PRIVATES = 161
LONG_FILES = 22
LONGEST = 807


def test_what_users_name_is_what_it_was() -> None:
    """`python -m tests.structure` takes a change that is meant."""
    assert structure.public() == json.loads(structure.NAMES.read_text())


def test_the_map_is_current() -> None:
    assert structure.document() == structure.DOCUMENT.read_text()


def test_the_root_has_few_entries() -> None:
    here = [p.name for p in (structure.ROOT / "pagedkv").iterdir() if p.name != "__pycache__"]
    assert len(here) <= 15, sorted(here)


def test_no_room_is_full() -> None:
    rooms: dict[str, int] = {}
    for path in structure.files().values():
        rooms[str(path.parent)] = rooms.get(str(path.parent), 0) + 1
    engine = {room: n for room, n in rooms.items() if "tools" not in room and "cli" not in room}
    assert max(engine.values()) <= 15, engine


def test_every_file_says_what_it_is() -> None:
    for line in structure.document().splitlines():
        assert not line.startswith("- ") or len(line.partition(": ")[2]) > 10, line


def test_circles_of_imports_become_fewer() -> None:
    known = structure.files()
    graph = {name: structure.imports(name, path, known) for name, path in known.items()}
    found = structure.circles(graph)
    assert sum(map(len, found)) <= ON_A_CIRCLE, found


def test_other_objects_private_names_become_fewer() -> None:
    engine = {n: p for n, p in structure.files().items() if not n.startswith("pagedkv.tools")}
    found = [place for path in engine.values() for place in structure.foreign_privates(path)]
    assert len(found) <= FOREIGN_PRIVATES, (len(found), found[-20:])


def test_long_files_become_fewer() -> None:
    lengths = {n: len(p.read_text().splitlines()) for n, p in structure.files().items()}
    long = {name: length for name, length in lengths.items() if length > 350}
    assert len(long) <= LONG_FILES and max(long.values()) <= LONGEST, long
