"""The command line: options, plan, doctor, output, and errors in one line."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import pagedkv
from pagedkv.cli import doctor, doctor_checks, main, options, output, shapes
from pagedkv.cli.disk import measure_disk
from pagedkv.integrations import releases
from pagedkv.integrations.mlx_lm.model_info import stock_maker

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent


def run(capsys: Capture, *argv: str) -> tuple[int, str, str]:
    code = main.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: Capture, *argv: str) -> str:
    """The one line that a command ends with when it fails."""
    code, out, err = run(capsys, *argv)
    assert code == 1, out
    assert out == ""
    assert err.startswith("pagedkv: error: ")
    assert err.count("\n") == 1, err
    return err


def as_process(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "pagedkv", *argv]
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, **options)


# The whole


def test_help_has_examples(capsys: Capture) -> None:
    assert run(capsys, "--help")[0] == 0
    for command in ("generate", "serve", "plan", "doctor", "stress", "calibrate"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert f"  pagedkv {command} " in out.partition("examples:")[2]


def test_version(capsys: Capture) -> None:
    assert run(capsys, "--version")[:2] == (0, f"pagedkv {pagedkv.__version__}\n")


@pytest.mark.parametrize("argv", [(), ("fly",), ("plan",), ("plan", "--contxt", "1"), ("stress",)])
def test_a_command_line_that_cannot_be_read_is_one_line_and_2(
    capsys: Capture, argv: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "--help" in err


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from pagedkv.cli.main import main; "
        "main(['plan', '--model', 'demo', '--context', '8K', '--cold', '1GB']); "
        "print([m for m in ('mlx_lm', 'transformers', 'tokenizers') if m in sys.modules], "
        "file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_a_reader_that_goes_away_is_no_error() -> None:
    # More than a pipe holds, so that writing fails.
    script = (
        "import sys; from pagedkv.cli import main, output, plan; "
        "plan.emit = lambda *a: print('x' * 1_000_000); "
        "sys.exit(main.main(['plan', '--model', 'demo', '--context', '8K', '--cold', '1GB']))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_interrupting_is_130_without_a_traceback(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_rows", interrupted)
    assert run(capsys, "doctor") == (130, "", "pagedkv: interrupted\n")


def test_sigterm_leaves_no_cold_files(tmp_path: Path) -> None:
    process = as_process(
        *("stress", "--model", "synthetic:llama3-8b", "--tokens", "1M", "--layers", "1"),
        *("--cold-dir", str(tmp_path), "--cold", "4GB"),
    )
    deadline = time.monotonic() + 30
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert list(tmp_path.iterdir()) == []


# Bad input


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--warm", "8GBB"), "warm='8GBB' is not a size"),
        (("--warm", "80%"), "warm='80%' is not a size"),
        (("--cold=-1",), "cold='-1' is not a size"),
        (("--warm", "1KB"), "warm budget 1,000 bytes is smaller than one page"),
        (("--kv", "K5V4"), "unknown precision K5V4"),
        (("--kv", "K4V4:9,K8V8"), "grows more precise with distance"),
        (("--hot-tokens", "some"), "hot_tokens='some' is not a number of tokens"),
        (("--page-tokens", "100"), "page_tokens is one of (256, 512, 1024)"),
        (("--backend", "magic"), "backend is one of auto"),
        (("--layers", "0"), "--layers is a number from 1 up, got 0"),
        (("--disk-rate", "fast"), "disk-rate='fast' is not a size"),
        (("--disk-rate", "0GB/s"), "write 3GB/s"),
    ],
)
def test_bad_values_name_what_would_do(capsys: Capture, argv: tuple[str, ...], says: str) -> None:
    assert says in fails(capsys, "plan", "--model", "llama3-8b", "--context", "8K", *argv)


@pytest.mark.parametrize("context", ["0", "128Q", "-5"])
def test_bad_contexts(capsys: Capture, context: str) -> None:
    assert "context" in fails(capsys, "plan", "--model", "llama3-8b", f"--context={context}")


def test_no_model_and_half_a_shape(capsys: Capture) -> None:
    assert "--head-dim" in fails(capsys, "plan", "--context", "8K", "--layers", "3")


def test_a_cold_directory_that_is_a_file_a_link_or_read_only(
    capsys: Capture, tmp_path: Path
) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(tmp_path)
    stress = ("stress", "--model", "synthetic:tiny", "--tokens", "1K", "--cold", "1MB")
    assert "is a file" in fails(capsys, *stress, "--cold-dir", str(file))
    assert "symbolic link" in fails(capsys, *stress, "--cold-dir", str(link))
    assert "cannot be created" in fails(capsys, *stress, "--cold-dir", str(file / "sub"))


@pytest.mark.parametrize("command", ["generate", "stress"])
def test_models_that_are_none(capsys: Capture, tmp_path: Path, command: str) -> None:
    rest = {"generate": ("--prompt", "hello"), "stress": ("--tokens", "1K")}[command]

    def says(model: str | Path) -> str:
        return fails(capsys, command, "--quiet", "--model", str(model), *rest)

    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    assert "there is no model folder" in says(tmp_path / "missing")
    assert "there is no model folder 'nonsense'" in says("nonsense")
    assert "is a file" in says(file)
    assert "no config.json" in says(folder)
    (folder / "config.json").write_text("{not json")
    assert "cannot load the model" in says(folder)
    (folder / "config.json").write_text("{}")
    assert "cannot load the model" in says(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "cannot load the model" in says(folder)


def test_plan_of_folders_that_are_no_models(capsys: Capture, tmp_path: Path) -> None:
    def says() -> str:
        return fails(capsys, "plan", "--model", str(tmp_path), "--context", "8K")

    assert "not a model" in says()
    (tmp_path / "config.json").write_text("[]")
    assert "not an object" in says()
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    assert "num_attention_heads" in says()
    (tmp_path / "config.json").write_text('{"kv_lora_rank": 512}')
    assert "MLA" in says()


def test_a_missing_mlx_lm_is_one_line_with_the_remedy(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    line = fails(capsys, "generate", "--model", "demo", "--prompt", "hello")
    assert "pip install 'pagedkv[lm]'" in line


@pytest.mark.parametrize("hard", [1024, 3000, 8192])
def test_mlx_lm_leaves_the_limit_of_open_files(hard: int) -> None:
    """It asks for 2,048 of at most 4,096, which is an error below and a loss above."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < hard:
        pytest.skip("this machine allows fewer")
    code = (
        "import resource, sys; from pagedkv.cli import main\n"
        "before = resource.setrlimit\n"
        "code = main.main(['generate', '--model', '/no/model', '--prompt', 'x'])\n"
        "print(code, 'mlx_lm.utils' in sys.modules, resource.setrlimit is before)\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard)),
    )
    assert done.stdout == f"1 True True\n{min(hard, 2048)} {hard}\n", done.stderr
    assert "there is no model folder" in done.stderr


def test_synthetic_options_are_not_for_real_models(capsys: Capture) -> None:
    line = fails(capsys, "stress", "--model", "demo", "--tokens", "1K", "--layers", "2")
    assert "synthetic" in line


# Options


def _args(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_tier_options(parser)
    options.add_mlx_lm_options(parser)
    return parser.parse_args(argv)


def test_only_what_is_given_differs_from_the_default() -> None:
    assert options.tier_config(_args()) == pagedkv.TierConfig()
    config = options.tier_config(_args("--hot-tokens", "1K", "--cold", "0", "--backend", "auto"))
    assert config == pagedkv.TierConfig(hot_tokens=1024, cold="0")
    base = pagedkv.TierConfig(kv="K8V4", warm="1GB")
    config = options.tier_config(_args("--warm", "2GB"), base)
    assert (config.kv, config.warm) == ("K8V4", "2GB")


def test_every_setting_has_an_option() -> None:
    given = vars(_args())
    assert set(pagedkv.TierConfig().to_dict()) <= set(given)


@pytest.mark.parametrize(
    ("bits", "kv"), [("4", "K4V4"), ("8,4", "K8V4"), (" 3 , 2 ", "K3V2"), ("8", "K8V8")]
)
def test_kv_bits_of_mlx_lm(bits: str, kv: str) -> None:
    assert options.tier_config(_args("--kv-bits", bits, "--kv-group-size", "64")).kv == kv


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--kv-bits", "5"), "K5V5"),
        (("--kv-bits", "four"), "give one number"),
        (("--kv-bits", "8,4,2"), "give one number"),
        (("--kv-bits", "4", "--kv", "K8V4"), "both set the precision"),
        (("--kv-group-size", "32"), "groups of 64"),
        (("--kv-group-size", "64,32"), "groups of 64"),
        (("--kv-group-size", "64,64,64"), "groups of 64"),
        (("--max-kv-size", "7"), "max_kv_size is a number of tokens from 8 up"),
        (("--max-kv-size", "many"), "max_kv_size='many' is not a number of tokens"),
    ],
)
def test_what_mlx_lm_has_and_pages_have_not(argv: tuple[str, ...], says: str) -> None:
    with pytest.raises(pagedkv.ConfigError, match=says):
        options.tier_config(_args(*argv))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("131072", 131072), ("128K", 131072), ("1.5k", 1536), ("1M", 2**20), ("131,072", 131072)],
)
def test_token_counts(text: str, tokens: int) -> None:
    assert options.parse_tokens(text, "context") == tokens


def test_rates() -> None:
    assert options.parse_rate("3GB/s", "rate") == options.parse_rate("3GB", "rate") == 3 * 10**9


# plan


def test_plan_counts_what_the_library_counts(capsys: Capture) -> None:
    argv = ("plan", "--model", "llama3-8b", "--context", "128K", "--warm", "2GB")
    code, out, _ = run(capsys, *argv, "--disk-rate", "3GB/s", "--format", "json")
    document = json.loads(out)
    expected = pagedkv.plan(
        pagedkv.KVShape(8, 128, 128), 32, 131072, pagedkv.TierConfig(), 3e9
    ).to_dict()
    assert code == 0
    assert {k: document[k] for k in expected} == expected
    assert document["fp16_bytes"] == 131072 * 8 * 256 * 2 * 32
    assert document["config"]["warm"] == "2GB"


def test_plan_table_and_exit_code(capsys: Capture) -> None:
    argv = ("plan", "--model", "llama3-8b", "--context", "128K", "--format", "table")
    code, out, _ = run(capsys, *argv, "--cold", "1GB")
    assert code == 1
    assert "NO: 131,072 tokens do not fit" in out
    code, out, _ = run(capsys, *argv, "--cold", "16GB", "--disk-rate", "2.84GB/s")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["tier", "hot", "warm", "cold"]
    assert "17.2 GB" in out
    assert "tokens per second          at most 0.724/s" in out
    # 24 layers, 8 heads, 128 x 128 for keys and values; those with 8 bits need none.
    assert "treatments 50.3 MB)" in out
    assert "tokens, K4V4; K8V8 in one layer of 4\n" in out
    code, out, _ = run(
        capsys, *argv, *("--cold", "16GB", "--disk-rate", "2.84GB/s"), "--layer-kv", "same"
    )
    assert "tokens per second          at most 1/s" in out
    assert "treatments 67.1 MB)" in out


def test_plan_as_csv_is_one_row(capsys: Capture) -> None:
    _, out, _ = run(capsys, "plan", "--model", "demo", "--context", "8K", "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert (row["context"], row["layers"], row["config.kv"]) == ("8192", "30", "K4V4")


def test_plan_reads_a_config_and_warns_past_its_limit(capsys: Capture, tmp_path: Path) -> None:
    inner = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "hidden_size": 512,
        "max_position_embeddings": 4096,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": inner}))
    argv = ("plan", "--model", str(tmp_path), "--context", "8K", "--cold", "1GB")
    _, out, err = run(capsys, *argv)
    document = json.loads(out)
    shape = (document["layers"], document["kv_heads"], document["head_dim"])
    assert shape == (2, 8, 64)
    assert "8,192 tokens are more than the model's limit of 4,096" in err
    assert "2 of 4 layers" in err
    _, out, err = run(capsys, *argv, "--layers", "3", "--quiet")
    assert json.loads(out)["layers"] == 3
    assert err == ""


def test_plan_measures_the_disk(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagedkv.cli.disk.TEST_BYTES", 2**23)
    argv = ("plan", "--model", "demo", "--context", "64K", "--warm", "16MB", "--cold", "4GB")
    _, out, _ = run(capsys, *argv, "--measure-disk", "--cold-dir", str(tmp_path))
    document = json.loads(out)
    rate = document["disk_bytes_per_second"]
    assert document["tokens_per_second"] == pytest.approx(rate / document["cold_bytes_per_token"])
    assert list(tmp_path.iterdir()) == []


def test_known_models_have_whole_groups_of_heads() -> None:
    for shape in shapes.KNOWN.values():
        assert shape.query_heads % shape.kv_heads == 0


# doctor


@pytest.fixture
def small_disk_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "measure_disk", lambda where: measure_disk(where, 2**23))


@pytest.mark.usefixtures("small_disk_test")
def test_doctor_finds_this_machine_well(capsys: Capture, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "doctor", "--cold-dir", str(tmp_path), "--cold", "1MB")
    document = json.loads(out)
    rows = {row["name"]: row for row in document["checks"]}
    assert code == 0
    assert document["ok"] is True
    assert rows["pagedkv"]["value"] == pagedkv.__version__
    assert {"mlx", "device", "backend", "memory", "disk speed", "codec K4V4"} <= rows.keys()
    assert rows["attention dequantize"]["status"] == "ok"
    assert rows["attention quantized"]["status"] in ("ok", "warn")
    assert str(tmp_path) in rows["cold directory"]["value"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_disk_test")
def test_doctor_fails_on_a_bad_directory_and_goes_on(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    code, out, _ = run(capsys, "doctor", "--cold-dir", str(file), "--format", "csv")
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(out))}
    assert code == 1
    assert rows["cold directory"]["status"] == "fail"
    assert "is a file" in rows["cold directory"]["hint"]
    assert rows["codec K4V4"]["status"] == "ok"


@pytest.mark.usefixtures("small_disk_test")
def test_doctor_fails_on_wrong_numbers(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = doctor_checks.attend
    monkeypatch.setattr(doctor_checks, "attend", lambda *a, **k: right(*a, **k) + 0.01)
    argv = ("doctor", "--cold-dir", str(tmp_path), "--format", "table")
    code, out, _ = run(capsys, *argv, "--cold", "1000TB", "--warm", "1000TB")
    assert code == 1
    assert "attention dequantize  fail    largest error 0.01" in out
    assert "-> wrong results: please report it" in out
    assert "the budgets take 1e+03 TB" in out or "the budgets take" in out
    assert "--cold 1000TB is more than is free" in out


def test_doctor_says_so_when_a_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> mx.array:
        raise RuntimeError("no\nimplementation")

    monkeypatch.setattr(doctor_checks, "attend", broken)
    rows = list(doctor_checks.check_backends(pagedkv.TierConfig(backend="quantized")))
    found = {row.name: (row.status, row.value) for row in rows}
    assert found["attention quantized"] == ("fail", "RuntimeError: no implementation")
    assert found["attention dequantize"][0] == "warn"


def test_layer_ranges() -> None:
    assert doctor._ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# Output


def test_tables_align_numbers_to_the_right() -> None:
    table = output.Table(("tier", "tokens"), [["hot", "7"], ["warm", "1,234"]], title="t")
    assert table.render() == "t\ntier  tokens\nhot        7\nwarm   1,234"
    assert output.facts([("a", "b"), ("long", "c")]).render() == "a     b\nlong  c"


def test_flattening() -> None:
    nested = {"a": 1, "b": {"c": {"d": 2}, "e": [1, 2]}}
    assert output.flatten(nested) == {"a": 1, "b.c.d": 2, "b.e": "[1, 2]"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12 ms"), (12.34, "12.3 s"), (245, "4 min 05 s"), (7260, "2 h 01 min")],
)
def test_durations(value: float, text: str) -> None:
    assert output.seconds(value) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_appears_late_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    stream = Terminal()
    with output.Progress("reading", 1000, stream=stream) as progress:
        now[0] = 1.9
        progress.update(100)
        assert stream.getvalue() == ""
        now[0] = 2.5
        progress.update(250, "warm 1 MB")
        assert "reading 250/1,000 tokens  25%  100/s  7.5 s left  warm 1 MB" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[2K")


def test_progress_is_for_terminals_only() -> None:
    stream = io.StringIO()
    with output.Progress("reading", 10, delay=0, stream=stream) as progress:
        progress.update(5)
    quiet = Terminal()
    with output.Progress("reading", 10, delay=0, stream=quiet, quiet=True) as progress:
        progress.update(5)
    assert stream.getvalue() == quiet.getvalue() == ""


def test_the_format_depends_on_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert output.choose_format(None) == "table"
    assert output.choose_format("csv") == "csv"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert output.choose_format(None) == "json"


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(pagedkv.ConfigError, match="cannot write"):
        output.write_json(str(tmp_path), {})


def test_doctor_and_serve_name_releases_that_will_not_do(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"mlx": "0.32.3", "mlx-lm": "0.31.3", "numpy": "2.0"}
    monkeypatch.setattr(releases, "version_of", found.get)
    monkeypatch.setattr(doctor_checks, "version_of", found.get)
    rows = {row.name: row for row in doctor_checks.check_versions()}
    assert rows["mlx"].status == rows["mlx-lm"].status == "fail"
    assert "mlx 0.32.3 is installed, and must be 0.32.4 or newer" in rows["mlx"].hint
    line = fails(capsys, "serve", "--model", "demo")
    assert "mlx-lm 0.31.3 is installed, and must be 0.32 or newer and older than 0.33" in line
    with pytest.raises(pagedkv.ConfigError, match=r"mlx 0\.32\.3 is installed"):
        stock_maker(object())
    found |= {"mlx": "0.40.0.dev20261201", "mlx-lm": "0.33.0"}
    assert releases.unsupported("mlx") == ""
    assert "older than 0.33" in fails(capsys, "serve", "--model", "demo")


def test_the_releases_are_those_that_pyproject_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"]["lm"]
    declared = [line.partition(";")[0] for line in required if line.startswith("mlx")]
    oldest, lm = releases.MLX, f"mlx-lm>={releases.MLX_LM},<{releases.NEXT_MLX_LM}"
    assert declared == [f"mlx>={oldest}", f"mlx[cpu]>={oldest}", lm]
