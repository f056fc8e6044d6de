"""Reads and writes weight files (safetensors, torch files, Detectron's pickles) without running code in them."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
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

__all__ = ["SUFFIXES", "Checkpoint", "read_checkpoint", "write_checkpoint"]

FORMAT = "fpnx-weights"
FORMAT_VERSION = 1

SUFFIXES = (".pt", ".pth", ".pkl", ".safetensors")
# Keys under which files hold the state dict.
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "blobs")
LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of files of torch.save before 1.6
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
        description: the description that `write_checkpoint` adds; None in other files.
        config: the text of the training config (mmdetection); None where there is none.
    """

    state: Mapping[str, Tensor]
    wrapper: str = ""
    description: Mapping[str, Any] | None = None
    config: str | None = None


def read_checkpoint(file: Path) -> Checkpoint:
    """Read the tensors in `file`; its first bytes decide on the format, except for `.safetensors`.

    Raises:
        FpnxError: the file is damaged, holds no parameters, or could run code.
    """
    if file.exists() and not file.is_file():  # opening a FIFO would block
        raise FpnxError(f"cannot read weights from {escape(file)}: it is not a regular file")
    try:
        with open(file, "rb") as handle:
            start = handle.read(len(LEGACY_TORCH_MAGIC))
            if file.suffix == ".safetensors" or start[8:9] == b"{":
                return _read_safetensors(file)
            if start.startswith(b"PK") or start == LEGACY_TORCH_MAGIC:
                content = _read_torch(file, zipped=start.startswith(b"PK"))
            elif start[:1] in (b"\x80", b"(", b"}"):
                handle.seek(0)
                content = _read_pickle(handle)
            else:
                raise pickle.UnpicklingError("it is neither a torch file nor safetensors nor a pickle")
    except safetensors.SafetensorError as error:
        raise FpnxError(f"cannot read weights from {escape(file)}: {error}") from error
    except READ_ERRORS as error:
        raise FpnxError(f"cannot read weights from {escape(file)}: {_reason(error)}") from error
    return _extract_state_dict(content, file)


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


def _read_torch(file: Path, zipped: bool) -> Any:
    placeholders: list[Any] = []
    if zipped:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in names if not REPLACED_GLOBALS.fullmatch(name))
        if refused:
            raise pickle.UnpicklingError(f"it asks for {_first_names(refused)}, {UNSAFE}")
        placeholders = [(_Placeholder, name) for name in names]
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


def _extract_state_dict(content: Any, file: Path) -> Checkpoint:
    """Find the state dict in the content of a file: the content itself, or under one of `WRAPPERS`."""
    if not isinstance(content, dict):
        raise FpnxError(f"{escape(file)} is not a state dict (names with tensors): save model.state_dict()")
    meta = content.get("meta")
    config = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), None) \
        if isinstance(meta, dict) else None  # fmt: skip
    description = content.get("fpnx")
    inner, wrapper = content, ""
    for _ in range(2):
        key = next((key for key in WRAPPERS if isinstance(inner.get(key), dict)), None)
        if key is None:
            break
        inner, wrapper = inner[key], f"{wrapper}.{key}".lstrip(".")
    state = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        raise FpnxError(f"{escape(file)} is not a state dict (names with tensors): save model.state_dict()")
    return Checkpoint(state, wrapper, _parse_description(description, file), config)


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
    text = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **description}, sort_keys=True)
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
