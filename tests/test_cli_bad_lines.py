"""Command lines that cannot work: every option of every command, bad files, bad streams."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pagedkv import ConfigError
from pagedkv.cli import bench, calibrate, doctor, eval, generate, main, options, serve, stress
from pagedkv.cli.streams import standard_streams
from pagedkv.tools.stress import StressOptions
from tests.models import byte_model

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
ROOT = Path(__file__).parent.parent

TINY = ("--hot-tokens", "64", "--sink-tokens", "4", "--page-tokens", "256", "--cold", "8MB")
LINES = {
    "generate": ("generate", "--model", "m", "--prompt", "x"),
    "serve": ("serve", "--model", "m"),
    "plan": ("plan", "--model", "llama3-8b", "--context", "8K"),
    "doctor": ("doctor", "--model", "m"),
    "stress": ("stress", "--model", "synthetic:tiny", "--tokens", "1K"),
    "bench": ("bench", "all", "--quick"),
    "eval": ("eval", "--model", "m", "--text", "english"),
    "calibrate": ("calibrate", "--model", "m", "--out", "o.json"),
}
"""For each command a line that is right."""

INSTEAD = {"--prompt-file": "--prompt", "--demo-document": "--prompt", "--text": "--text"}
"""Options that cannot stand beside one of those lines."""

BAD = {
    "nan": "nan",
    "inf": "-inf",
    "overflow": "1e999",
    "tiny": "1e-320",
    "negative": "-1",
    "fraction": "0.5",
    "400 digits": "9" * 400 + ".5",
    "400 digits GB": "9" * 400 + ".5GB",
    "5000 digits": "9" * 5000,
    "64 bits": str(2**64),
    "empty": "",
    "commas": ",,",
    "no UTF-8": "\udcff",
    "two lines": "a\nb",
    "no home": "~nobody.has.this.name/x",
    "a long name": "x" * 5000,
}


class Ready(Exception):  # it is no error
    """A command has understood its line, and would begin."""


def _begin(*args: Any, **more: Any) -> NoReturn:
    raise Ready


@pytest.fixture
def parse_only(monkeypatch: Patch, tmp_path: Path) -> None:
    """Every command raises `Ready` where it would begin to work."""
    for module in (generate, eval, calibrate, stress):
        monkeypatch.setattr(module, "load_model", _begin)
    monkeypatch.setattr(serve, "locate", _begin)
    monkeypatch.setattr(doctor, "_rows", _begin)
    monkeypatch.setattr(stress, "SyntheticStress", _begin)
    monkeypatch.setattr(bench, "Campaign", _begin)
    monkeypatch.setattr("pagedkv.cli.disk.measure_disk", _begin)
    parser = main.build_parser()
    monkeypatch.setattr(main, "build_parser", lambda: parser)
    monkeypatch.chdir(tmp_path)


def _options() -> Iterator[tuple[str, str]]:
    """Every option that takes a value: command and name."""
    (commands,) = (
        action for action in main.build_parser()._actions if isinstance(action.choices, dict)
    )
    assert isinstance(commands.choices, dict)
    assert set(commands.choices) == set(LINES)
    for command, parser in commands.choices.items():
        for action in parser._actions:
            if action.option_strings and action.nargs != 0 and not action.choices:
                yield command, action.option_strings[0]


def line_with(command: str, option: str, value: str) -> list[str]:
    line = list(LINES[command])
    if (other := INSTEAD.get(option)) in line:
        at = line.index(other)
        del line[at : at + 2]
    return [*line, f"{option}={value}"]


def told(capsys: Capture, code: int, argv: list[str]) -> str:
    """What a failed command says: one line, not too long."""
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if "error: " in line]
    where = [part[:40] for part in argv]
    assert code in (1, 2), where
    assert out == "", where
    assert len(notes) == 1, (where, err[:2000])
    assert err.endswith("\n") and "Traceback" not in err, (where, err[:2000])
    assert len(err) < 2500, where
    return notes[0]


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("command", LINES)
def test_no_value_of_any_option_ends_in_a_traceback(capsys: Capture, command: str) -> None:
    for option in (name for where, name in _options() if where == command):
        for value in BAD.values():
            argv = line_with(command, option, value)
            try:
                code = main.main(argv)
            except Ready:
                capsys.readouterr()
                continue
            except BaseException as e:
                raise AssertionError([part[:40] for part in argv]) from e
            if code == 0:
                capsys.readouterr()
            else:
                told(capsys, code, argv)


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("generate", "--temp"),
        ("generate", "--top-p"),
        ("generate", "--skip-below"),
        ("generate", "--warm"),
        ("stress", "--sample"),
        ("bench", "--max-seconds"),
        ("eval", "--max-seconds"),
        ("plan", "--disk-rate"),
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "-1"])
def test_only_numbers_are_numbers(capsys: Capture, command: str, option: str, value: str) -> None:
    argv = line_with(command, option, value)
    told(capsys, main.main(argv), argv)


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("value", ["-1", str(2**64), "9" * 5000, "one"])
@pytest.mark.parametrize("command", ["generate", "stress"])
def test_seeds_have_64_bits(capsys: Capture, command: str, value: str) -> None:
    argv = line_with(command, "--seed", value)
    assert "from 0 to 18446744073709551615" in told(capsys, main.main(argv), argv)
    with pytest.raises(Ready):
        main.main(line_with(command, "--seed", str(2**64 - 1)))


def test_token_counts_are_exact_and_not_endless() -> None:
    assert options.parse_tokens("9007199254740993", "context") == 2**53 + 1
    for text in ("9" * 20, "9" * 400 + ".5", "9" * 5000, f"{2**63}"):
        with pytest.raises(ConfigError, match="more than there can be"):
            options.parse_tokens(text, "context")


@pytest.mark.parametrize(
    "more", [{"tokens": 2**41}, {"sample_seconds": float("nan")}, {"sample_seconds": 1e308}]
)
def test_stress_options_that_cannot_be_meant(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        StressOptions(**{"tokens": 1000, **more})
    with pytest.raises(ConfigError, match="more often than there are tokens"):
        StressOptions(tokens=1000, ops={"decode": 10**9})


# Files


DAMAGED = {
    "empty": b"",
    "binary": bytes(range(256)) * 16,
    "deep": b"[" * 200_000,
    "a list": b"[1, 2]",
    "foreign": b'{"format": "another", "model": 3}',
    "numbers": b'{"num_hidden_layers": 1e400, "num_attention_heads": NaN, "hidden_size": 64}',
    "no heads": b'{"num_hidden_layers": 2, "num_attention_heads": 0, "hidden_size": 64}',
    "odd kinds": b'{"num_hidden_layers": -2, "num_attention_heads": 1, "hidden_size": 64, '
    b'"layer_types": ["full_attention", ["x"]]}',
}
INPUTS = [
    ("plan", "--model", "config.json"),
    ("generate", "--prompt-file", "f.txt"),
    ("generate", "--prompt-cache-file", "f.safetensors"),
    ("generate", "--treatment", "f.json"),
    ("eval", "--text", "f.txt"),
    ("calibrate", "--text", "f.txt"),
]


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(("command", "option", "name"), INPUTS)
def test_files_to_read_that_are_missing_damaged_or_foreign(
    capsys: Capture, tmp_path: Path, command: str, option: str, name: str
) -> None:
    file = tmp_path / name
    argv = line_with(command, option, str(file))

    def is_told() -> None:
        try:
            told(capsys, main.main(argv), argv)
        except Ready:  # it is read with the model, or it is text
            capsys.readouterr()
            assert option in ("--treatment", "--prompt-cache-file") or file.exists()

    is_told()
    for content in DAMAGED.values():
        file.write_bytes(content)
        is_told()
    file.unlink()
    file.mkdir()
    is_told()


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        ("generate", "--save-cache", ("no/f.safetensors", "file/f.safetensors", "d.safetensors")),
        ("generate", "--stats-json", ("no/f.json", "file/f.json", "folder")),
        ("stress", "--report", ("no/f.json", "file/f.json", "d.json", "file/x")),
        ("bench", "--out", ("file", "file/x")),
        ("calibrate", "--out", ("no/f.json", "file/f.json", "folder")),
    ],
)
def test_places_to_write_to_that_are_none(
    capsys: Capture, tmp_path: Path, command: str, option: str, names: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    for name in ("folder", "d.json", "d.safetensors"):
        (tmp_path / name).mkdir()
    for name in names:
        argv = line_with(command, option, str(tmp_path / name))
        told(capsys, main.main(argv), argv)


@pytest.mark.parametrize("content", [DAMAGED["empty"], DAMAGED["deep"], DAMAGED["foreign"]])
def test_a_calibration_that_is_none(capsys: Capture, tmp_path: Path, content: bytes) -> None:
    model = tmp_path / "model"
    model.mkdir()
    file = tmp_path / "f.json"
    file.write_bytes(content)
    line = ["generate", "--model", byte_model(model), "--prompt", "x", *TINY, "--quiet"]
    argv = [*line, "--treatment", str(file)]
    assert "is not a calibration" in told(capsys, main.main(argv), argv)


def test_a_path_below_the_home_directory(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.user_path("~/x") == tmp_path / "x"
    assert options.user_path("~nobody.has.this.name/x") == Path("~nobody.has.this.name/x")


# Streams


def shell(line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = f'"{sys.executable}" -m pagedkv plan --model llama3-8b --context 8K {line}'
    more = {"PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, env={**os.environ, **more}, check=False
    )


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (">&-", 1, b"standard output is closed"),
        (">/dev/full", 1, b"No space left on device"),
        ("--context 0 >&- <&-", 1, b"standard output is closed"),
        ("2>&- --format json", 0, b""),
    ],
)
def test_streams_that_are_closed_or_full(line: str, code: int, says: bytes) -> None:
    if "full" in line and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell(line)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert done.stderr.count(b"\n") == (1 if says else 0), done.stderr


def test_a_prompt_from_a_closed_standard_input(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    argv = ["generate", "--model", "m", "--prompt", "-"]
    assert "standard input: it is closed" in told(capsys, main.main(argv), argv)


def test_a_closed_stderr_does_not_send_notes_to_the_results(monkeypatch: Patch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    with standard_streams() as has_stdout:
        print("a note", file=sys.stderr)
        print("a result")
    assert has_stdout and sys.stderr is None
    assert out.getvalue() == "a result\n"


def test_an_encoding_that_lacks_a_character(monkeypatch: Patch, capsys: Capture) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with standard_streams():
        print("é and \udcff")
    sys.stdout.flush()
    assert raw.getvalue() == b"\\xe9 and \\udcff\n"
    assert "written as escapes" in capsys.readouterr().err
    assert sys.stdout.errors == "strict"
    with standard_streams():
        print("plain")
    assert capsys.readouterr().err == ""


def test_what_cannot_be_written_is_let_go(monkeypatch: Patch) -> None:
    with suppress(FileNotFoundError), Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print("x")
        assert main.main(["plan", "--model", "demo", "--context", "8K"]) == 1
        full.flush()  # as the interpreter does in the end
