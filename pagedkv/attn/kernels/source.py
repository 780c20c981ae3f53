"""Kernel texts: constants, the shared functions, and the call that each target makes of them.

The functions lie beside this file (``*.h``), in the common subset of Metal and CUDA over a small
vocabulary that a prelude defines for each target. A text is specialized by constants: shapes,
precisions and types are known when it is compiled.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from pagedkv.allocator import KVShape, PageGeometry

MAX_PRECISIONS = 8
"""Precisions of pages that one launch can read: three bits of a table's word."""

_FOLDER = Path(__file__).resolve().parent

SHARED_LIMIT = 32 * 1024
"""Bytes of threadgroup memory that every Apple GPU has."""

MERGE_WARPS = 8
"""SIMD groups of a threadgroup that merges."""

MERGE_GROUP = 8
"""Splits that are merged together, before their groups are."""

MERGE_GROUPS = 64
"""Groups of splits that a launch can merge itself, at most."""

HOT_TILE = 16
"""Hot tokens that a SIMD group attends at once."""

LANES = 32
"""Lanes of a SIMD group (Metal) or warp (CUDA)."""


@dataclass(frozen=True)
class KernelText:
    """One specialized kernel, for any target.

    Attributes:
        name: unique for its text.
        inputs: names of the input arrays, 32-bit words whatever they hold.
        outputs: names of the output arrays.
        constants: definitions that the files need.
        files: of this folder, in the order in which they build on each other.
        call: the function called, with a lane's position, shared memory, inputs and outputs.
        shared_words: words of shared memory of a threadgroup.
        written: inputs that it writes in.
        treated: whether it has the files' sections for treated layers.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: str
    files: tuple[str, ...]
    call: str
    shared_words: int
    written: tuple[str, ...] = ()
    treated: bool = False

    @property
    def functions(self) -> str:
        """What follows the prelude."""
        return "\n".join([self.constants, *(_read(name, self.treated) for name in self.files)])

    def header(self, target: str) -> str:
        """Prelude and functions, in a namespace of their own.

        CUDA's compiler reads the files itself: MLX hashes the text that it is given at each
        evaluation. Metal's cannot.
        """
        if target == "cuda":
            prelude, *files = (f'#include "{_FOLDER / name}"' for name in self._all("cuda"))
            inside = "\n".join([prelude, self.constants, *files])
            return f"namespace pagedkv {{\n{inside}\n}}\n"
        includes, rest = _split_includes(_text(f"prelude_{target}.h"))
        return f"{includes}\nnamespace pagedkv {{\n{rest}\n{self.functions}\n}}\n"

    def _all(self, target: str) -> list[str]:
        return [f"prelude_{target}.h", *self.files]

    def body(self, target: str) -> str:
        """The kernel's body: shared memory, and the call."""
        position, shared = _TARGETS[target]
        kinds = {name: "OUTPUT" if name in self.written else "BUFFER" for name in self.inputs}
        arguments = [f"({kind}){name}" for name, kind in kinds.items()]
        arguments += [f"(OUTPUT){name}" for name in self.outputs]
        declared = shared.format(vectors=-(-self.shared_words // 4))
        return f"{declared}\npagedkv::{self.call}({position}, shared, {', '.join(arguments)});"


METAL_MEMORY = (
    "threadgroup uint4 memory[{vectors}];\nthreadgroup u32* shared = (threadgroup u32*)memory;"
)
"""Threadgroup memory on Metal: up to 16 bytes are stored at once, so it is aligned to that."""

_TARGETS = {
    "cuda": (
        "threadIdx.x & 31, threadIdx.x >> 5, blockIdx.x, blockIdx.y, blockIdx.z",
        "using namespace pagedkv;\nextern __shared__ __align__(16) u32 shared[];",
    ),
    "metal": (
        "thread_index_in_simdgroup, simdgroup_index_in_threadgroup, "
        "threadgroup_position_in_grid.x, threadgroup_position_in_grid.y, "
        "threadgroup_position_in_grid.z",
        f"using namespace pagedkv;\n{METAL_MEMORY}",
    ),
}


@dataclass(frozen=True)
class AttentionSpec:
    """What a decode kernel is specialized for.

    Attributes:
        geometries: of the pages, one per precision.
        heads: KV heads.
        key_dim: channels of a key, a multiple of 16.
        value_dim: channels of a value, a multiple of 8.
        page_tokens: tokens of a page.
        rows: query heads of a KV head times query tokens.
        query_tokens: query tokens, the last ones of the sequence.
        sequences: rows of the batch.
        scale: multiplies the products of queries and keys.
        query_bfloat: whether queries and output are bfloat16, else float16.
        hot_bfloat: whether hot tokens and 16-bit pages are bfloat16, else float16.
        causal: whether query tokens see only what is before them.
        final: whether there is one split, so that the output needs no merging.
        together: whether the launch that attends merges as well.
        has_sinks: whether the model has attention sinks.
        warps: SIMD groups of a threadgroup.
        fetch_ahead: whether tiles are copied to threadgroup memory while others are worked on.
        windowed: whether the first tokens of the pages are behind a window, and not seen.
        treated: whether pages hold transformed keys and values: see ``treat.h``. Then no split
            has both pages and hot tokens.
    """

    geometries: tuple[PageGeometry, ...]
    heads: int
    key_dim: int
    value_dim: int
    page_tokens: int
    rows: int
    query_tokens: int
    sequences: int
    scale: float
    query_bfloat: bool
    hot_bfloat: bool
    causal: bool
    final: bool
    together: bool
    has_sinks: bool
    warps: int
    fetch_ahead: bool
    windowed: bool = False
    treated: bool = False

    @property
    def staging(self) -> bool:
        """Whether pages may be staged: then a launch attends some of the splits only."""
        return not self.together

    @property
    def row_blocks(self) -> int:
        """Blocks of query rows, each of which reads the pages once: 16 rows, or 8 if that's all."""
        return group_count(self.rows)

    @cached_property
    def _constants(self) -> Mapping[str, str]:
        padded, group = padding(self.value_dim)
        numbers: dict[str, int] = {
            "HEADS": self.heads,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "PADDED_VALUE_DIM": padded,
            "VALUE_GROUP": group,
            "PAGE_TOKENS": self.page_tokens,
            "ROWS": self.rows,
            "QUERY_TOKENS": self.query_tokens,
            "SEQUENCES": self.sequences,
            "WARPS": self.warps,
            "MERGE_WARPS": MERGE_WARPS,
            "MERGE_GROUP": MERGE_GROUP,
            "MERGE_GROUPS": MERGE_GROUPS,
            "ROW_GROUPS": self.row_blocks,
            "HOT_TILE": HOT_TILE,
            "STAGED_KEY_WORDS": self._staged[0],
            "STAGED_VALUE_WORDS": self._staged[1],
        }
        flags = {
            "QUERY_BFLOAT": self.query_bfloat,
            "HOT_BFLOAT": self.hot_bfloat,
            "CAUSAL": self.causal and self.query_tokens > 1,
            "FINAL": self.final,
            "FETCH_AHEAD": self.fetch_ahead,
            "WINDOWED": self.windowed,
        }
        return {
            **{f"CONSTANT int {name}": str(value) for name, value in numbers.items()},
            **{f"CONSTANT bool {name}": str(value).lower() for name, value in flags.items()},
            "CONSTANT float SCALE_LOG2E": f"{self.scale * math.log2(math.e):.9e}f",
        }

    @cached_property
    def _staged(self) -> tuple[int, int]:
        """Words of shared memory for the keys and values of a tile of 64 tokens."""
        coded = [g.precision for g in self.geometries if g.precision.quantized]
        if not (self.fetch_ahead and coded):
            return 0, 0
        padded, _ = padding(self.value_dim)
        keys = self.key_dim * 2 * max(p.key_bits for p in coded)
        values = 2 * padded * max(p.value_bits for p in coded) + 32
        return keys, values

    @property
    def shared_words(self) -> int:
        """Words of shared memory of a threadgroup that attends; laid out in ``attend.h``."""
        padded, group = padding(self.value_dim)
        blocks = 2 if self.rows > 8 else 1
        queries = self.key_dim * blocks * 4
        per_warp = self.key_dim + padded // group * 64 + sum(self._staged)
        merge = -(-padded // 64) * 64 * blocks * 8
        return max(queries + self.warps * per_warp, merge) + self.warps * blocks * 16

    @property
    def _sinks(self) -> tuple[str, ...]:
        return ("sinks",) if self.has_sinks else ()

    @cached_property
    def attend(self) -> KernelText:
        """The kernel that attends splits."""
        words, treated = self.shared_words, self.treated
        sources = source_names(len(self.geometries), self.staging)
        inputs: tuple[str, ...] = ("q", "params", "table", "hot_keys", "hot_values", *sources)
        files: tuple[str, ...] = ("numbers.h", "page.h", "layout.h", "attend.h")
        if treated:
            inputs, files = (*inputs, "treatment"), (*files, "treat.h")
        if not self.together:
            outputs = ("partial", "stats")
            return self._text("attend_pages", inputs, outputs, files, words, (), treated)
        inputs, outputs = (*inputs, *self._sinks, "turns", "scratch"), ("out", "next_turns")
        files, written = (*files, "merge.h", "together.h"), ("scratch",)
        return self._text("attend_and_merge", inputs, outputs, files, words, written, treated)

    @cached_property
    def merge(self) -> KernelText:
        """The kernel that merges splits."""
        return self._text(
            "merge_splits",
            ("partial", "stats", "params", *self._sinks),
            ("out",),
            ("numbers.h", "merge.h"),
            MERGE_WARPS * (self.value_dim + 2),
        )

    def _text(
        self,
        call: str,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        files: Sequence[str],
        shared_words: int,
        written: tuple[str, ...] = (),
        treated: bool = False,
    ) -> KernelText:
        constants = [f"{name} = {value};" for name, value in self._constants.items()]
        constants.append(f"#define HAS_SINKS {int(self.has_sinks)}")
        constants.append(sources_macro(self.geometries, self.staging, treated))
        return specialize(call, inputs, outputs, files, constants, shared_words, written, treated)


def specialize(
    call: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    files: Sequence[str],
    constants: Sequence[str],
    shared_words: int,
    written: tuple[str, ...] = (),
    treated: bool = False,
) -> KernelText:
    """One kernel: constants, then the functions of some files of this folder.

    Args:
        call: the function that is the kernel.
        inputs: names of the input arrays.
        outputs: names of the output arrays.
        files: in this order.
        constants: definitions that the files need; `SHARED_WORDS` is added.
        shared_words: words of shared memory of a threadgroup.
        written: inputs that it writes in.
        treated: whether it has the files' sections for treated layers.
    """
    size = f"CONSTANT int SHARED_WORDS = {shared_words};"
    definitions = "\n".join([*constants, size])
    # MLX keeps compiled kernels on disk under their names: a changed file is another name.
    preludes = [f"prelude_{target}.h" for target in _TARGETS]
    texts = [definitions, *(_read(name, treated) for name in (*preludes, *files))]
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    name = f"pagedkv_{call}_{digest}"
    return KernelText(
        name, inputs, outputs, definitions, tuple(files), call, shared_words, written, treated
    )


def page_constants(shape: KVShape, page_tokens: int) -> list[str]:
    """Definitions that ``layout.h`` needs."""
    padded, group = padding(shape.value_dim)
    numbers = {
        "HEADS": shape.kv_heads,
        "KEY_DIM": shape.key_dim,
        "VALUE_DIM": shape.value_dim,
        "PADDED_VALUE_DIM": padded,
        "VALUE_GROUP": group,
        "PAGE_TOKENS": page_tokens,
    }
    return [f"CONSTANT int {name} = {value};" for name, value in numbers.items()]


def sources_macro(geometries: Sequence[PageGeometry], staging: bool, treated: bool = False) -> str:
    """The list of precisions over which a kernel's switches are made: see ``layout.h``."""
    entries = (
        f"X({i}, {g.precision.key_bits}, {g.precision.value_bits}, {g.page_bytes // 4}u)"
        for i, g in enumerate(geometries)
    )
    macro = f"#define STAGING {int(staging)}\n#define SOURCES(X) {' '.join(entries)}"
    return f"#define TREATED 1\n{macro} AFTER_##X" if treated else macro


def source_names(precisions: int, staging: bool) -> tuple[str, ...]:
    """Names of the page arrays of each precision: the slab, and what is staged."""
    kinds = ("source", "staged") if staging else ("source",)
    return tuple(f"{kind}{i}" for i in range(precisions) for kind in kinds)


def group_count(rows: int) -> int:
    """Row blocks of that many query rows."""
    return math.ceil(rows / (16 if rows > 8 else 8))


def padding(value_dim: int) -> tuple[int, int]:
    """Padded value channels and their group; see `PageGeometry`."""
    group = 64 if value_dim % 64 == 0 else 32
    return -(-value_dim // group) * group, group


def supported(key_dim: int, value_dim: int) -> bool:
    """Whether the kernels take these head dims."""
    padded, _ = padding(value_dim)
    lane_units = -(-padded // 64)
    whole = value_dim % (8 * lane_units) == 0 and padded % (8 * lane_units) == 0
    return key_dim % 16 == 0 and 16 <= key_dim <= 256 and whole and value_dim <= 256


@cache
def _text(name: str) -> str:
    """A file of this folder, shortened."""
    text = (_FOLDER / name).read_text()
    text = re.sub(r"//[^\n]*", "", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n".join(_tight(line) for line in lines if line)


def _read(name: str, treated: bool) -> str:
    """A file of this folder with its sections ``#if TREATED`` chosen; they do not nest.

    Kernels that treat nothing keep their text, and so the names under which they were compiled.
    """
    lines, section = [], ""
    for line in _text(name).split("\n"):
        if line == "#if TREATED":
            section = "treated"
        elif section and line == "#else":
            section = "plain"
        elif section and line == "#endif":
            section = ""
        elif not section or (section == "treated") == treated:
            lines.append(line)
    return "\n".join(lines)


def _tight(line: str) -> str:
    """A line without the blanks that say nothing; directives and strings stay as they are."""
    if line.startswith("#") or line.endswith("\\") or '"' in line:
        return line
    return re.sub(r" ?([=*/%<>^?:;,(){}\[\]!]) ?", r"\1", line)


def _split_includes(text: str) -> tuple[str, str]:
    lines = text.splitlines()
    outer = ("#include", "using namespace")
    last = max((i for i, line in enumerate(lines) if line.startswith(outer)), default=-1)
    return "\n".join(lines[: last + 1]), "\n".join(lines[last + 1 :])
