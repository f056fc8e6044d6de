"""Reads and writes weight files (safetensors, torch files, Detectron's pickles) without running code in them."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fpnx.core.errors import FpnxError
from fpnx.core.files import atomic_write
from fpnx.core.text import escape
from fpnx.core.warning_filters import ignored_warnings

__all__ = ["AVERAGES", "SUFFIXES", "Checkpoint", "read_checkpoint", "read_description", "write_checkpoint"]

FORMAT = "fpnx-weights"
FORMAT_VERSION = 1

SUFFIXES = (".pt", ".pth", ".pkl", ".safetensors")
# Keys under which files hold the state dict; keys and prefixes of averages (EMA) beside it; what timm takes first.
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "blobs")
AVERAGES = re.compile(r"(.*[_.])?(ema|swa|averaged?)([_.].*)?", re.IGNORECASE)
TIMM_AVERAGES = ("state_dict_ema", "model_ema")
LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of files of torch.save before 1.6
BYTES_COMPARED = 64  # of the beginning of a file
UNSAFE = "which could run code: save model.state_dict() alone"
READ_ERRORS = (  # raised by readers for damaged or malicious files
    pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    MemoryError, OverflowError, RecursionError, ImportError, AssertionError, NotImplementedError,
)  # fmt: skip

# Globals in training checkpoints beside tensors: loggers, optimisers, options. A placeholder class replaces each one,
# so no code of these packages runs. A file that asks for any other global is refused.
REPLACED_GLOBALS = re.compile(
    r"(mmengine|mmcv|mmdet|mmpretrain|detectron2|fvcore|yacs|omegaconf|pytorch_lightning|lightning|lightning_fabric)\..+"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|(_?core)\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer))"
    r"|argparse\.Namespace|pathlib(\._local)?\.\w*Path|datetime\.\w+"
    r"|builtins\.(getattr|slice|range|frozenset)|__builtin__\.(getattr|slice|frozenset)"
    r"|torch\.optim\.[\w.]+"
)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weight file.

    Attributes:
        state: names → tensors on the CPU, as in the file.
        wrapper: the key under which the file holds them, such as `"model"`; `""` for the file itself.
        beside: other keys under which it holds parameters of the same names, such as `"state_dict_ema"`.
        automatic: whether `wrapper` would have been taken without asking for it.
        description: the description that `write_checkpoint` adds; None in other files.
        config: the text of the training config (mmdetection); None where there is none.
    """

    state: Mapping[str, Tensor]
    wrapper: str = ""
    beside: tuple[str, ...] = ()
    automatic: bool = True
    description: Mapping[str, Any] | None = None
    config: str | None = None


def read_checkpoint(file: Path, key: str | None = None, *, averages_first: bool = False) -> Checkpoint:
    """Read the tensors in `file`; its first bytes decide on the format.

    Args:
        file: a torch file, safetensors or a pickle.
        key: the key under which the parameters are; None finds it.
        averages_first: take the average (EMA) where the file has one beside the parameters, as timm does.

    Raises:
        FpnxError: the file is damaged, holds no parameters (under `key`), or could run code.
    """
    if file.exists() and not file.is_file():  # opening a FIFO would block
        raise FpnxError(f"cannot read weights from {escape(file)}: it is not a regular file")
    try:
        with open(file, "rb") as handle:
            start = handle.read(BYTES_COMPARED)
            if what := _other_content(file, start):
                raise pickle.UnpicklingError(what)
            is_torch = start.startswith((b"PK", LEGACY_TORCH_MAGIC))
            if start[8:9] == b"{" or (file.suffix == ".safetensors" and not is_torch):
                checkpoint = _read_safetensors(file)
                if key is not None:
                    raise FpnxError(f"weights key {escape(key)!r}: {escape(file)} is safetensors, which has no keys")
                return checkpoint
            if is_torch:
                handle.seek(0)  # torch.load would take a path that ends in .safetensors for safetensors
                content = _read_torch(handle, zipped=start.startswith(b"PK"))
            elif start[:1] in (b"\x80", b"(", b"}"):
                handle.seek(0)
                content = _read_pickle(handle)
            else:
                raise pickle.UnpicklingError(
                    "it is neither a torch file nor safetensors nor a pickle: save model.state_dict() with torch.save"
                )
    except safetensors.SafetensorError as error:
        state = "begins as safetensors, but is truncated or damaged" if start[8:9] == b"{" else "is no safetensors file"
        raise FpnxError(f"cannot read weights from {escape(file)}: it {state}: copy or download it again") from error
    except READ_ERRORS as error:
        raise FpnxError(f"cannot read weights from {escape(file)}: {_reason(error)}") from error
    return _extract_state_dict(content, file, key, averages_first)


def read_description(file: Path) -> Mapping[str, Any]:
    """The description that `write_checkpoint` adds, from the header alone where the file is safetensors; else empty.

    Raises:
        FpnxError: as `read_checkpoint` does.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            return _parse_description((handle.metadata() or {}).get("fpnx"), file) or {}
    except (safetensors.SafetensorError, OSError):  # of another kind, or damaged
        return read_checkpoint(file).description or {}


def _other_content(file: Path, start: bytes) -> str:
    """What a file is that holds no weights by its first bytes, and what to do; else empty."""
    if not start:
        return "it is empty: save it or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS to the weights: get the file itself with git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page: download the file itself"
    if start.startswith(b"PK") and not zipfile.is_zipfile(file):
        return "it is a torch file that is cut off: save it or download it again"
    return ""


def _read_safetensors(file: Path) -> Checkpoint:
    with safetensors.safe_open(file, framework="pt") as handle:
        description = _parse_description((handle.metadata() or {}).get("fpnx"), file)
        state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return Checkpoint(state, description=description)


class _Placeholder:
    """Replaces an object of another framework: accepts any arguments and state, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_torch(file: BinaryIO, zipped: bool) -> Any:
    placeholders: list[Any] = []
    if zipped:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in names if not REPLACED_GLOBALS.fullmatch(name))
        if refused:
            raise pickle.UnpicklingError(f"it asks for {_first_names(refused)}, {UNSAFE}")
        placeholders = [(_Placeholder, name) for name in names]
        file.seek(0)
    with torch.serialization.safe_globals(placeholders), ignored_warnings():
        return torch.load(file, map_location="cpu", weights_only=True)


class _AllowedCall:
    """A function that a pickle may call.

    Instances have no `__dict__` and are created anew for each file, so a file cannot affect how others are read.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Dtype:
    """Replaces numpy.dtype; accepts numbers of fixed size only."""

    __slots__ = ("text",)

    def __init__(self, text: Any, *_: Any) -> None:
        if not isinstance(text, str) or not re.fullmatch(r"[<>|=]?(f[248]|[iu][1248]|b1)", text):
            raise pickle.UnpicklingError(f"it holds arrays of {str(text)[:20]!r}, not of numbers")
        self.text = text.lstrip("<>|=")

    def __setstate__(self, state: Any) -> None:
        order, *rest = state[1:]
        if order not in ("<", ">", "|", "=") or any(item is not None for item in rest[:3]):
            raise pickle.UnpicklingError("it holds structured arrays, not plain ones")
        self.text = order + self.text


class _Array:
    """Replaces numpy.ndarray; checks that shape, dtype and number of bytes agree."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        if isinstance(data, str):  # written by Python 2
            data = data.encode("latin1")
        if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)) or order not in ("C", "F"):
            raise pickle.UnpicklingError("it holds an array that is not plain numbers")
        kind = np.dtype(dtype.text)
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise pickle.UnpicklingError("it holds an array without a shape")
        if len(data) != kind.itemsize * int(np.prod(shape, dtype=object)):
            raise pickle.UnpicklingError(f"an array of shape {shape} has {len(data)} bytes")
        value = np.frombuffer(data, kind).reshape(shape, order=order)
        self.value = np.array(value, kind.newbyteorder("="), order="C")
        return self


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads dictionaries of numbers, strings and arrays, and refuses every other global without importing it."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin1")
        rebuild = _AllowedCall(lambda *_: _Array())
        scalar = _AllowedCall(lambda dtype, data: _Array().fill(data, dtype, (), "C"))
        from_buffer = _AllowedCall(lambda data, dtype, shape, order: _Array().fill(data, dtype, shape, order))
        self._allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _AllowedCall(_Array),
            ("numpy", "dtype"): _AllowedCall(_Dtype),
            ("_codecs", "encode"): _AllowedCall(_encode),
            ("collections", "OrderedDict"): _AllowedCall(OrderedDict),
        }
        for core in ("numpy.core", "numpy._core"):
            self._allowed[f"{core}.multiarray", "_reconstruct"] = rebuild
            self._allowed[f"{core}.multiarray", "scalar"] = scalar
            self._allowed[f"{core}.numeric", "_frombuffer"] = from_buffer
        for builtins in ("builtins", "__builtin__"):
            self._allowed[builtins, "bytearray"] = _AllowedCall(_plain_bytes)
            self._allowed[builtins, "bytes"] = _AllowedCall(_plain_bytes)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {escape(f'{module}.{name}')}, {UNSAFE}")
        return self._allowed[module, name]


def _encode(text: str, encoding: str = "") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {str(encoding)[:20]!r}")
    return text.encode("latin1")


def _plain_bytes(*value: Any) -> bytes:
    if len(value) > 1 or not all(isinstance(item, (bytes, bytearray)) for item in value):
        raise pickle.UnpicklingError("it builds bytes from something else")
    return bytes(*value)


def _read_pickle(stream: BinaryIO) -> Any:
    content = _RestrictedUnpickler(stream).load()
    return _with_tensors(content) if isinstance(content, dict) else content


def _with_tensors(content: Mapping[Any, Any], depth: int = 2) -> dict[Any, Any]:
    """Replace the arrays in `content`, and in the dictionaries in it, by tensors."""
    converted = {}
    for name, value in content.items():
        if isinstance(value, _Array) and value.value is not None:
            value = torch.from_numpy(value.value)
        elif isinstance(value, dict) and depth:
            value = _with_tensors(value, depth - 1)
        converted[name] = value
    return converted


def _extract_state_dict(content: Any, file: Path, key: str | None, averages_first: bool) -> Checkpoint:
    """Find the state dict in the content of a file: the content itself, or what is under one of its keys."""
    state_dicts = _state_dicts(content) if isinstance(content, dict) else {}
    if not state_dicts:
        raise FpnxError(f"{escape(file)} is not a state dict (names with tensors): save model.state_dict()")
    meta = content.get("meta")
    config = next((meta[name] for name in ("cfg", "config") if isinstance(meta.get(name), str)), None) \
        if isinstance(meta, dict) else None  # fmt: skip
    description = _parse_description(content.get("fpnx"), file)
    default = _default_key(content, state_dicts, averages_first)
    taken = default if key is None else _asked_key(key, state_dicts, file)
    if taken is None:  # several that differ: what they are called is a prefix then
        joined = {f"{path}.{name}": state[name] for path, state in state_dicts.items() if path for name in state}
        return Checkpoint(joined, description=description, config=config)
    state = state_dicts[taken]
    names = _without_wrappers(state)
    beside = [
        path
        for path, other in state_dicts.items()
        if path != taken and 2 * len(_without_wrappers(other) & names) > len(names)
    ]
    return Checkpoint(
        state, taken, beside=tuple(beside), automatic=taken == default, description=description, config=config
    )


def _state_dicts(content: Mapping[Any, Any], path: str = "", depth: int = 3) -> dict[str, dict[str, Tensor]]:
    """Path of keys, such as `"model.net"` → tensors by name, for all dictionaries in `content` that hold tensors."""
    state = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    found = {path: state} if state else {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, dict) and depth:
            found |= _state_dicts(value, f"{path}.{name}" if path else name, depth - 1)
    return found


def _default_key(content: Any, state_dicts: Mapping[str, Mapping[str, Tensor]], averages_first: bool) -> str | None:
    """The path that is taken without `--weights-key`; None where several are as good."""
    averages = [path for path in TIMM_AVERAGES if path in state_dicts] if averages_first else []
    if averages:
        return averages[0]
    inner, path = content, ""
    for _ in range(2):
        name = next((name for name in WRAPPERS if isinstance(inner.get(name), dict)), None)
        if name is None:
            break
        inner, path = inner[name], f"{path}.{name}".lstrip(".")
    most = max(len(state) for state in state_dicts.values())
    if path in state_dicts and (path or len(state_dicts[path]) == most):
        return path
    large = [path for path, state in state_dicts.items() if path and 2 * len(state) >= most]
    plain = [path for path in large if not AVERAGES.fullmatch(path)] or large
    return plain[0] if len(plain) == 1 else None


def _asked_key(key: str, state_dicts: Mapping[str, Any], file: Path) -> str:
    """The path that `--weights-key` means: equal to it, or with keys below or above it."""
    paths = list(state_dicts)
    below = [path for path in paths if path.startswith(f"{key}.")]
    above = [path for path in paths if path.endswith(f".{key}")]
    meant = [*([key] if key in paths else []), *below, *above]
    if meant:
        return meant[0]
    listed = ", ".join(escape(path) for path in paths if path) or "none under a key"
    raise FpnxError(f"weights key {escape(key)!r}: {escape(file)} holds no parameters there, but {listed}")


def _without_wrappers(names: Iterable[str]) -> set[str]:
    """The names without what wrappers of modules put before them."""
    return {re.sub(r"^((module|model|_orig_mod)\.)+", "", name) for name in names}


def _parse_description(text: Any, file: Path) -> dict[str, Any] | None:
    if not isinstance(text, str):
        return None
    try:
        description = json.loads(text)
        version = description["version"]
        if description["format"] != FORMAT or not isinstance(version, int):
            raise ValueError(description["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise FpnxError(f"{escape(file)} has a description that is not fpnx's: {error}") from error
    if version > FORMAT_VERSION:
        raise FpnxError(f"{escape(file)} is of version {version}, this fpnx reads {FORMAT_VERSION}: update fpnx")
    return dict(description)


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write `state` and its description atomically: safetensors for `.safetensors`, else a torch file.

    Raises:
        FpnxError: another suffix, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".pt", ".pth", ".safetensors"):
        raise FpnxError(f"weights file {escape(target)}: take a name that ends in .safetensors, .pt or .pth")
    # safetensors refuses tensors that share memory; contiguous copies on the CPU do not share any.
    copies = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    text = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **description})
    try:
        with atomic_write(target) as temporary:
            if target.suffix == ".safetensors":
                safetensors.torch.save_file(copies, temporary, metadata={"fpnx": text})
            else:
                torch.save({"fpnx": text, "state_dict": copies}, temporary)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise FpnxError(f"cannot write {escape(target)}: {error}") from error


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in one line, without torch's advice to load it unsafely."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if re.search(r"hasRecord|inline_container|PytorchStreamReader", str(error)):
        return "it is a zip archive, but no whole torch file"
    match = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"(?:unsafe|blocklisted) module (\S+)", str(error))
    if match:
        return f"it asks for {escape(match[1])}, {UNSAFE}"
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return escape(lines[0].split(". ")[0])[:200] if lines else type(error).__name__


def _first_names(names: list[str]) -> str:
    return escape(", ".join(names[:3]) + (", …" if len(names) > 3 else ""))
