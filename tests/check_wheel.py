"""Build the wheel and check that it ships `pagedkv/` and nothing beside it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    strangers = {t for t in tops if t != "pagedkv" and not t.endswith(".dist-info")}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("pagedkv", "allocator", "tiers")
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    expected = {s if s.startswith("pagedkv/") else f"pagedkv/{s}" for s in sources}
    expected.add("pagedkv/py.typed")
    missing = expected - set(names)
    if strangers or missing:
        print(f"wheel ships {sorted(strangers)} and misses {sorted(missing)}")
        return 1
    print(f"wheel: {len(names)} files, all in pagedkv/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
