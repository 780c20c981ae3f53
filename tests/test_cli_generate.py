"""`pagedkv generate`, and the real-model side of `stress` and `doctor`, with a tiny model."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pagedkv
from pagedkv.cli import generate, loading
from pagedkv.cli.main import main
from pagedkv.tools.stress import ModelStress
from tests.models import byte_model, tiny_llama

Capture = pytest.CaptureFixture[str]
SMALL = ("--hot-tokens", "64", "--sink-tokens", "4", "--page-tokens", "256", "--cold", "8MB")
TIGHT = (*SMALL, "--warm", "300KB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers with a tokenizer of bytes, as mlx-lm reads it."""
    return byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("All work and no play makes a dull page. " * 50)
    return str(path)


def run(capsys: Capture, *argv: str) -> tuple[int, str, str]:
    """Run a command; its report as JSON where nothing else is asked for."""
    code = main(argv if "--format" in argv else (*argv, "--format", "json"))
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: Capture, *argv: str) -> str:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert err.startswith("pagedkv: error: ")
    assert err.count("\n") == 1, err
    return err


def test_a_prompt_larger_than_memory_is_answered(
    capsys: Capture, tmp_path: Path, folder: str, book: str
) -> None:
    stats = tmp_path / "stats.json"
    command = ("generate", "--model", folder, "--prompt-file", book, "--max-tokens", "5", *TIGHT)
    code, out, err = run(capsys, *command, "--stats-json", str(stats))
    result = json.loads(out)
    assert (code, err) == (0, "reading a prompt of 2,018 tokens\n")
    tiers = result["stats"]
    assert min(tiers[t]["tokens"] for t in ("hot", "warm", "cold")) > 0
    assert tiers["warm"]["allocated"] <= 300_000
    assert result["prompt_tokens"] == 2000 + len("<user></s><assistant>") - len("/s>")
    assert result["decode_steps"] == result["tokens"] + 1
    assert 0 < result["nvme_bytes_read_in_decode"] <= tiers["nvme_bytes_read"]
    # Every decode step reads every cold page of every layer, at least 16 KiB each.
    least = 16384 * tiers["cold"]["pages"] * result["decode_steps"]
    assert result["nvme_bytes_read_in_decode"] >= least
    written = json.loads(stats.read_text())
    assert written["cold"] == tiers["cold"]
    assert written["generation"]["tokens"] == result["tokens"]


def test_tiers_do_not_change_the_text(capsys: Capture, folder: str, book: str) -> None:
    command = ("generate", "--model", folder, "--prompt-file", book, "--max-tokens", "8")
    texts = [
        json.loads(run(capsys, *command, *SMALL, "--warm", warm)[1])["text"]
        for warm in ("300KB", "64MB")
    ]
    assert texts[0] == texts[1]


def test_text_streams_and_tables_follow(capsys: Capture, folder: str) -> None:
    command = ("generate", "--model", folder, "--prompt", "hello", "--max-tokens", "4", *TIGHT)
    _, out, _ = run(capsys, *command, "--format", "table", "--quiet")
    text = json.loads(run(capsys, *command)[1])["text"]
    assert out == text + "\n"
    _, out, _ = run(capsys, *command, "--format", "table")
    assert out.startswith(text + "\n\ntier ")
    for name in ("fp16 cache", "NVMe", "read-ahead", "process", "2 paged"):
        assert name in out
    _, out, _ = run(capsys, *command, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["text"] == text
    assert row["stats.hot.tokens"]


@pytest.mark.parametrize("terminal", [False, True])
def test_an_answer_is_text_wherever_it_goes(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, folder: str, terminal: bool
) -> None:
    command = ("generate", "--model", folder, "--prompt", "hello", "--max-tokens", "4", *TIGHT)
    text = json.loads(run(capsys, *command)[1])["text"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert main(command) == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_file_in_the_home_directory_is_found_again(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ("generate", "--model", folder, "--prompt", "x", "--max-tokens", "1", *TIGHT)
    files = ("--save-cache", "~/c.safetensors", "--stats-json", "~/s.json")
    assert run(capsys, *command, *files)[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["hot"]
    _, out, _ = run(capsys, *command, "--prompt-cache-file", "~/c.safetensors")
    assert json.loads(out)["cached_tokens"] > 0


def test_sampling_repeats_with_its_seed(capsys: Capture, folder: str) -> None:
    command = ("generate", "--model", folder, "--prompt", "x", "--temp", "2", *TIGHT)

    def text(seed: str) -> str:
        return str(json.loads(run(capsys, *command, "--seed", seed)[1])["text"])

    assert text("1") == text("1") != text("2")


def test_dtypes_and_the_chat_template(capsys: Capture, folder: str) -> None:
    command = ("generate", "--model", folder, "--prompt", "hello", "--max-tokens", "1", *TIGHT)
    code, out, _ = run(capsys, *command, "--no-chat-template", "--dtype", "float16")
    assert code == 0
    assert json.loads(out)["prompt_tokens"] == 5
    assert json.loads(out)["stats"]["fp16_bytes"] > 0


def test_a_16_bit_model_is_computed_in_float32_without_a_gpu(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = tiny_llama(), []
    model.set_dtype(mx.bfloat16)
    monkeypatch.setattr(loading, "has_gpu", lambda: True)
    loading.cast_model(model, "auto", said.append)
    assert (model.layers[0].self_attn.q_proj.weight.dtype, said) == (mx.bfloat16, [])
    monkeypatch.setattr(loading, "has_gpu", lambda: False)
    loading.cast_model(model, "auto", said.append)
    assert model.layers[0].self_attn.q_proj.weight.dtype == mx.float32
    assert "no GPU" in said[0]


def test_standard_input_is_a_prompt(
    capsys: Capture, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", "--model", folder, "--max-tokens", "1", "--no-chat-template", *TIGHT)
    for source in (("--prompt", "-"), ("--prompt-file", "-")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"typed")))
        assert json.loads(run(capsys, *command, *source)[1])["prompt_tokens"] == 5


def test_the_demo_document_is_asked_about(capsys: Capture, folder: str) -> None:
    command = ("generate", "--model", folder, "--demo-document", "1K", "--max-tokens", "1", *TIGHT)
    code, out, err = run(capsys, *command)
    assert code == 0
    assert json.loads(out)["prompt_tokens"] > 1024
    assert "password" in err


# Saved caches


def test_a_conversation_goes_on_in_its_cold_directory(
    capsys: Capture, tmp_path: Path, folder: str, book: str
) -> None:
    cold, saved = str(tmp_path / "cold"), str(tmp_path / "talk.safetensors")
    command = ("generate", "--model", folder, "--max-tokens", "3", *TIGHT, "--cold-dir", cold)
    code, out, err = run(capsys, *command, "--prompt-file", book, "--save-cache", saved)
    one = json.loads(out)
    assert code == 0, err
    name = err.split()[-1]
    assert f"tokens stay in {cold}: go on with --resume {name}" in err
    texts = []
    for source in (("--prompt-cache-file", saved), ("--resume",)):
        again = (*command[:5], *TIGHT) if source[0] != "--resume" else command
        code, out, err = run(capsys, *again, "--prompt", "go on", *source)
        assert code == 0, err
        two = json.loads(out)
        content = one["tokens"] - (one["finish_reason"] == "stop")
        assert two["cached_tokens"] == one["prompt_tokens"] + content
        texts.append(two["text"])
    assert texts[0] == texts[1]
    assert "going on from" in err
    assert f"--resume {name}" in err  # the same sequence, longer now
    ask = (*command, "--prompt", "x")
    assert "holds no sequence 0123" in fails(capsys, *ask, "--quiet", "--resume", "0123")
    assert "give that" in fails(capsys, *command[:5], "--prompt", "x", "--resume")
    assert "leave --cold" in fails(capsys, *ask, "--no-disk")


def test_a_prompt_that_begins_like_an_earlier_one_is_not_read_again(
    capsys: Capture, tmp_path: Path, folder: str, book: str
) -> None:
    longer = tmp_path / "longer.txt"
    longer.write_text(Path(book).read_text() + " What of it?")
    cold = ("--cold-dir", str(tmp_path / "cold"))
    command = ("generate", "--model", folder, "--max-tokens", "3", *TIGHT, *cold)
    code, out, err = run(capsys, *command, "--prompt-file", book)
    assert code == 0, err
    assert json.loads(out)["cached_tokens"] == 0
    code, out, err = run(capsys, *command, "--prompt-file", str(longer))
    assert code == 0, err
    held = json.loads(out)["cached_tokens"]
    assert held > 200 and f"{held:,} of the prompt's" in err
    assert json.loads(out)["stats"]["prefix_tokens_reused"] == held
    for alone in (("--no-prefix-reuse",), ("--prefix-salt", "mine")):
        code, out, err = run(capsys, *command, "--prompt-file", str(longer), *alone)
        assert code == 0, err
        assert json.loads(out)["cached_tokens"] == 0


def test_no_disk_is_no_cold_tier(capsys: Capture, folder: str) -> None:
    command = ("generate", "--model", folder, "--prompt", "x", "--max-tokens", "1", "--no-disk")
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert json.loads(out)["stats"]["cold"]["budget"] == 0


def test_what_cannot_be_kept_is_told_after_the_answer(
    capsys: Capture, tmp_path: Path, folder: str, book: str
) -> None:
    command = ("generate", "--model", folder, "--prompt-file", book, "--max-tokens", "2", *SMALL)
    limits = ("--warm", "4MB", "--cold-dir", str(tmp_path / "cold"), "--write-limit", "100KB")
    code, out, err = run(capsys, *command, *limits)
    assert code == 1
    assert json.loads(out)["tokens"] == 2
    assert "write_limit of 100,000 bytes a day is reached" in err


def test_a_conversation_goes_on_where_it_was_saved(
    capsys: Capture, tmp_path: Path, folder: str, book: str
) -> None:
    saved = str(tmp_path / "talk.safetensors")
    command = ("generate", "--model", folder, "--max-tokens", "3")
    first = ("--prompt-file", book, "--prompt-cache-file", saved, "--save-cache", saved)
    code, out, err = run(capsys, *command, *first, *TIGHT, "--kv", "K8V4")
    one = json.loads(out)
    assert code == 0
    assert "beginning with an empty cache" in err
    code, out, err = run(capsys, *command, "--prompt", "go on", "--prompt-cache-file", saved)
    two = json.loads(out)
    assert code == 0, err
    content = one["tokens"] - (one["finish_reason"] == "stop")
    assert two["cached_tokens"] == one["prompt_tokens"] + content
    assert two["prompt_tokens"] == len("|<user>go on|<assistant>")  # | is </s>, one token
    assert two["config"]["kv"] == "K8V4"  # the saved tiers, except for what is given
    code, out, _ = run(
        capsys, *command, "--prompt", "go on", "--prompt-cache-file", saved, "--warm", "64MB"
    )
    assert json.loads(out)["text"] == two["text"]
    assert json.loads(out)["config"]["warm"] == "64MB"


def test_saved_caches_that_are_none(
    capsys: Capture, tmp_path: Path, folder: str, book: str
) -> None:
    command = ("generate", "--model", folder, "--prompt", "hello", "--max-tokens", "1", *TIGHT)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"junk" * 100)
    assert "not a saved cache" in fails(capsys, *command, "--prompt-cache-file", str(other))
    assert ".safetensors" in fails(capsys, *command, "--save-cache", str(tmp_path / "x.cache"))
    missing = str(tmp_path / "no" / "x.safetensors")
    assert "no such directory" in fails(capsys, *command, "--save-cache", missing)
    assert "no such directory" in fails(capsys, *command, "--stats-json", missing)


def test_another_models_cache_is_refused(capsys: Capture, tmp_path: Path, folder: str) -> None:
    saved = tmp_path / "other.safetensors"
    model = tiny_llama(seed=9)
    with pagedkv.wrap(model) as cache:
        model(mx.array([[1, 2, 3]]), cache=cache)
        cache.save(str(saved))
    pagedkv.unwrap(model)
    command = ("generate", "--model", folder, "--prompt", "hello", "--prompt-cache-file")
    assert "another model" in fails(capsys, *command, str(saved))


# Bad input


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--prompt", ""), "the prompt is empty (--prompt)"),
        (("--prompt", " \n"), "the prompt is empty"),
        (("--prompt-file", "/no/such/file"), "cannot read the prompt file"),
        (("--prompt-file", "/"), "cannot read the prompt file"),
        (("--prompt", "x", "--max-tokens", "0"), "--max-tokens is a number from 1 up, got 0"),
        (("--prompt", "x", "--temp", "-1"), "--temp is from 0 up"),
        (("--prompt", "x", "--top-p", "0"), "--top-p above 0"),
        (("--prompt", "x", "--prefill-step-size", "0"), "from 1 up"),
        (("--prompt", "x", "--max-kv-size", "3"), "max_kv_size is a number of tokens"),
        (("--prompt", "x", "--warm", "9KB"), "warm budget 9,000 bytes is smaller than one page"),
        (("--demo-document", "0"), "--demo-document is a number from 1 up"),
    ],
)
def test_bad_input_is_one_line(
    capsys: Capture, folder: str, argv: tuple[str, ...], says: str
) -> None:
    assert says in fails(capsys, "generate", "--model", folder, *argv)


def test_a_prompt_file_that_is_not_text(capsys: Capture, tmp_path: Path, folder: str) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"abc\xff\xfe")
    line = fails(capsys, "generate", "--model", folder, "--prompt-file", str(file))
    assert "is not text: byte 3" in line


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_read(
    capsys: Capture, folder: str, book: str
) -> None:
    command = ("generate", "--model", folder, "--prompt-file", book, *TIGHT, "--cold", "0")
    assert "2,018 tokens in 2 layers do not fit" in fails(capsys, *command)


def test_a_context_past_the_models_limit_is_a_warning(
    capsys: Capture, tmp_path: Path, folder: str
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("x" * 4500)
    command = ("generate", "--model", folder, "--prompt-file", str(file), "--max-tokens", "1")
    code, _, err = run(capsys, *command, *TIGHT)
    assert code == 0
    assert "\npagedkv: warning: the context has 4,517 tokens" in err
    assert err.count("\n") == 2


def test_a_template_that_fails_is_one_line() -> None:
    class Broken:
        has_chat_template = True

        def apply_chat_template(self, *args: Any, **options: Any) -> str:
            raise ValueError("no system\nrole")

    with pytest.raises(pagedkv.ConfigError, match=r"fails \(no system role\): use --no-chat"):
        loading.prompt_tokens(Broken(), "hello", template=True, continued=False)


def test_nothing_is_left_wrapped(capsys: Capture, folder: str) -> None:
    run(capsys, "generate", "--model", folder, "--prompt", "x", "--max-tokens", "1", *TIGHT)
    assert not pagedkv.cache.sdpa_hook.installed()


# Real models elsewhere


def test_stress_of_a_real_model(capsys: Capture, folder: str) -> None:
    command = ("stress", "--model", folder, "--tokens", "1500", "--needles", "3", "--chunk", "300")
    command = (*command, "--ops", "prefill")
    code, out, _ = run(capsys, *command, *TIGHT)
    report = json.loads(out)
    checks = {c["name"]: c for c in report["checks"]}
    assert code == 0, checks
    assert (checks["placement"]["count"], checks["placement"]["skipped"]) == (3, "")
    assert report["stats"]["cold"]["tokens"] > 0
    _, out, _ = run(capsys, *command, *SMALL, "--warm", "64MB")
    checks = {c["name"]: c for c in json.loads(out)["checks"]}
    assert "no page is cold" in checks["placement"]["skipped"]


def test_stress_finds_that_placement_changed_a_token(
    capsys: Capture, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = ModelStress._play

    def off(self: ModelStress, which: Any, suffix: str) -> Any:
        rows = play(self, which, suffix)
        return [(where, row + np.float32(1e-3) * bool(suffix)) for where, row in rows]

    monkeypatch.setattr(ModelStress, "_play", off)
    command = ("stress", "--model", folder, "--tokens", "1500", "--needles", "2", *TIGHT)
    command = (*command, "--ops", "prefill")
    code, out, _ = run(capsys, *command, "--format", "table")
    assert code == 1
    assert "2 wrong; decode step 0 at 1,501 tokens: logits differ by up to 0.001" in out


def test_doctor_says_which_layers_are_paged(folder: str) -> None:
    from pagedkv.cli import doctor

    class Args:
        model, dtype, quiet = folder, "auto", True

    rows = list(doctor._check_model(Args(), pagedkv.TierConfig()))  # type: ignore[arg-type]
    names = ["paged", "precision", *["treatment"] * (len(rows) - 2)]
    assert [(row.name, row.status) for row in rows] == [(name, "ok") for name in names]
    assert rows[0].value == "2 of 2 layers: 0-1"
    assert (rows[1].value, rows[1].hint) == ("K4V4: layers 0-1", "")
    for row in rows[2:]:
        assert "attention errs" in row.hint or row.value.startswith("none: "), row


def test_the_saved_config_is_read_without_a_model(tmp_path: Path) -> None:
    saved = str(tmp_path / "x.safetensors")
    model = tiny_llama()
    with pagedkv.wrap(model, pagedkv.TierConfig(kv="K8V8")) as cache:
        model(mx.array([[1, 2, 3]]), cache=cache)
        cache.save(saved)
    pagedkv.unwrap(model)
    assert generate.saved_config(saved).kv == "K8V8"
