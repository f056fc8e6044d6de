"""Files of parameters: safetensors, torch files and Detectron's pickles, read without running any code in them."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
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
from fpnx.core.text import escape

__all__ = ["SUFFIXES", "Checkpoint", "read_checkpoint", "write_checkpoint"]

FORMAT = "fpnx-weights"
FORMAT_VERSION = 1

SUFFIXES = (".pt", ".pth", ".pkl", ".safetensors")
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "blobs")  # keys that hold the parameters
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6 begins with this number
REFUSED = "which could run code: save model.state_dict() alone"
UNREADABLE = (  # what a damaged or hostile pickle makes a reader raise
    pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    MemoryError, OverflowError, RecursionError, ImportError, AssertionError, NotImplementedError,
)  # fmt: skip

# What training checkpoints hold beside tensors: loggers, optimisers, options. An inert class takes each one's place,
# so nothing of these packages runs; anything else that a file asks for is refused.
HARMLESS = re.compile(
    r"(mmengine|mmcv|mmdet|mmpretrain|detectron2|fvcore|yacs|omegaconf|pytorch_lightning|lightning|lightning_fabric)\..+"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|(_?core)\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer))"
    r"|argparse\.Namespace|pathlib(\._local)?\.\w*Path|datetime\.\w+"
    r"|builtins\.(getattr|slice|range|frozenset)|__builtin__\.(getattr|slice|frozenset)"
    r"|torch\.optim\.[\w.]+"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file held.

    Attributes:
        state: names → tensors on the CPU, as they stand in the file.
        wrapper: where in the file they were: `"model"`, or `""` for the file itself.
        about: what fpnx wrote beside them (`write_checkpoint`), where it did.
        config: the text of the training config, where there is one (mmdetection).
    """

    state: Mapping[str, Tensor]
    wrapper: str = ""
    about: Mapping[str, Any] | None = None
    config: str | None = None


def read_checkpoint(file: Path) -> Checkpoint:
    """Read the tensors in `file`; its beginning, not its name, says what it is.

    Raises:
        FpnxError: a file that is damaged, holds no parameters, or asks for code.
    """
    if file.exists() and not file.is_file():  # opening a FIFO would wait for ever
        raise FpnxError(f"cannot read weights from {escape(file)}: it is not a regular file")
    try:
        with open(file, "rb") as handle:
            start = handle.read(len(LEGACY_TORCH))
            if file.suffix == ".safetensors" or start[8:9] == b"{":
                return _read_safetensors(file)
            if start.startswith(b"PK") or start == LEGACY_TORCH:
                content = _read_torch(file, zipped=start.startswith(b"PK"))
            elif start[:1] in (b"\x80", b"(", b"}"):
                handle.seek(0)
                content = _read_pickle(handle)
            else:
                raise pickle.UnpicklingError("it is neither a torch file nor safetensors nor a pickle")
    except safetensors.SafetensorError as error:
        raise FpnxError(f"cannot read weights from {escape(file)}: {error}") from error
    except UNREADABLE as error:
        raise FpnxError(f"cannot read weights from {escape(file)}: {_reason(error)}") from error
    return _unwrapped(content, file)


def _read_safetensors(file: Path) -> Checkpoint:
    with safetensors.safe_open(file, framework="pt") as handle:
        about = _about((handle.metadata() or {}).get("fpnx"), file)
        return Checkpoint({name: handle.get_tensor(name) for name in handle.keys()}, about=about)  # noqa: SIM118


class _Inert:
    """Stands where a file wants an object of its framework: takes all that it is given and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _read_torch(file: Path, zipped: bool) -> Any:
    stand_ins: list[Any] = []
    if zipped:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in wanted if not HARMLESS.fullmatch(name))
        if refused:
            raise pickle.UnpicklingError(f"it asks for {_few(refused)}, {REFUSED}")
        stand_ins = [(_Inert, name) for name in wanted]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


class _Maker:
    """A function that a pickle may call. An object without a dictionary, made anew for each file, so that a file
    cannot leave anything behind on it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)


class _Dtype:
    """Stands for numpy.dtype: numbers of fixed size only."""

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
    """Stands for numpy.ndarray: takes shape and bytes, and checks that they belong together."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        if isinstance(data, str):  # what Python 2 wrote
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


class _ClosedUnpickler(pickle.Unpickler):
    """Builds dictionaries of numbers, texts and arrays; whatever else a file names is refused unseen."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin1")
        rebuild = _Maker(lambda *_: _Array())
        scalar = _Maker(lambda dtype, data: _Array().fill(data, dtype, (), "C"))
        from_buffer = _Maker(lambda data, dtype, shape, order: _Array().fill(data, dtype, shape, order))
        self._known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _Maker(_Array),
            ("numpy", "dtype"): _Maker(_Dtype),
            ("_codecs", "encode"): _Maker(_encode),
            ("collections", "OrderedDict"): _Maker(OrderedDict),
        }
        for core in ("numpy.core", "numpy._core"):
            self._known[f"{core}.multiarray", "_reconstruct"] = rebuild
            self._known[f"{core}.multiarray", "scalar"] = scalar
            self._known[f"{core}.numeric", "_frombuffer"] = from_buffer
        for builtins in ("builtins", "__builtin__"):
            self._known[builtins, "bytearray"] = _Maker(_plain_bytes)
            self._known[builtins, "bytes"] = _Maker(_plain_bytes)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {escape(f'{module}.{name}')}, {REFUSED}")
        return self._known[module, name]


def _encode(text: str, encoding: str = "") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {str(encoding)[:20]!r}")
    return text.encode("latin1")


def _plain_bytes(*value: Any) -> bytes:
    if len(value) > 1 or not all(isinstance(part, (bytes, bytearray)) for part in value):
        raise pickle.UnpicklingError("it builds bytes from something else")
    return bytes(*value)


def _read_pickle(stream: BinaryIO) -> Any:
    content = _ClosedUnpickler(stream).load()
    return _with_tensors(content) if isinstance(content, dict) else content


def _with_tensors(content: Mapping[Any, Any], depth: int = 2) -> dict[Any, Any]:
    """`content` and the dictionaries in it with tensors for arrays."""
    plain = {}
    for name, value in content.items():
        if isinstance(value, _Array) and value.value is not None:
            value = torch.from_numpy(value.value)
        elif isinstance(value, dict) and depth:
            value = _with_tensors(value, depth - 1)
        plain[name] = value
    return plain


def _unwrapped(content: Any, file: Path) -> Checkpoint:
    """Find the state dict in what a file held: the file itself, or under one of the usual keys."""
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
    return Checkpoint(state, wrapper, _about(description, file), config)


def _about(description: Any, file: Path) -> dict[str, Any] | None:
    if not isinstance(description, str):
        return None
    try:
        about = json.loads(description)
        version = about["version"]
        if about["format"] != FORMAT or not isinstance(version, int):
            raise ValueError(about["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise FpnxError(f"{escape(file)} has a description that is not fpnx's: {error}") from error
    if version > FORMAT_VERSION:
        raise FpnxError(f"{escape(file)} is of version {version}, this fpnx reads {FORMAT_VERSION}: update fpnx")
    return dict(about)


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `state` with its description: safetensors for `.safetensors`, else a torch file; whole or not at all.

    Raises:
        FpnxError: where the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".pt", ".pth", ".safetensors"):
        raise FpnxError(f"weights file {escape(target)}: take a name that ends in .safetensors, .pt or .pth")
    # Tensors may share memory, which safetensors refuses; contiguous copies on the CPU do not.
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    description = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **about}, sort_keys=True)
    part = target.with_name(target.name + ".part")
    try:
        if target.suffix == ".safetensors":
            safetensors.torch.save_file(plain, part, metadata={"fpnx": description})
        else:
            torch.save({"fpnx": description, "state_dict": plain}, part)
        os.replace(part, target)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise FpnxError(f"cannot write {escape(target)}: {error}") from error


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in a line; torch's advice to load it unsafely is left out."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if re.search(r"hasRecord|inline_container|PytorchStreamReader", str(error)):
        return "it is a zip archive, but no whole torch file"
    asked = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"(?:unsafe|blocklisted) module (\S+)", str(error))
    if asked:
        return f"it asks for {escape(asked[1])}, {REFUSED}"
    text = str(error).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return escape(lines[0].split(". ")[0])[:200] if lines else type(error).__name__


def _few(names: list[str]) -> str:
    return escape(", ".join(names[:3]) + (", …" if len(names) > 3 else ""))
