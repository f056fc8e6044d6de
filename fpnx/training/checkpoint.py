"""The state of an unfinished run in `<output>.part`, replaced after each epoch."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fpnx.core.errors import FpnxError
from fpnx.core.files import replace_file
from fpnx.core.text import escape
from fpnx.store.reader import different_fields

__all__ = ["read_progress", "refuse_other_run", "write_progress"]

FORMAT, FORMAT_VERSION = "fpnx-training", 1


def write_progress(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of a run; after a crash at any moment, the previous or the new one is there.

    Args:
        identity: what the run is, as plain values; `read_progress` compares it.
        state: tensors and plain values.

    Raises:
        FpnxError: where it cannot be written.
    """
    held = io.BytesIO()
    torch.save({"format": FORMAT, "version": FORMAT_VERSION, "identity": dict(identity), "state": dict(state)}, held)
    try:
        replace_file(path, [held.getbuffer()])  # type: ignore[list-item]
    except OSError as error:
        raise FpnxError(f"cannot write {escape(path)}: {error.strerror or error}: make room, or name another output") \
            from error  # fmt: skip


def read_progress(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `write_progress` wrote.

    Raises:
        FpnxError: it is not from `fpnx train`, or from a run with other options, images or labels.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it is of another program")
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"it has format version {content['version']}, and this fpnx reads {FORMAT_VERSION}")
        before, state = content["identity"], content["state"]
    except Exception as error:  # torch raises many types for a damaged file
        why = escape(str(error).split("\n")[0][:120])
        raise FpnxError(
            f"{escape(path)} cannot be continued ({why}): start over with --overwrite, or name another output"
        ) from error
    refuse_other_run(path, before, identity)
    return dict(state)


def refuse_other_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue what another run began.

    Args:
        path: its file, for messages.
        before, now: what the runs are; their `options` are compared first.

    Raises:
        FpnxError: naming what differs.
    """
    different = different_fields(before.get("options", {}), now["options"])
    different = different or different_fields({**before, "options": {}}, {**now, "options": {}})
    if different:
        shown = "; ".join(map(escape, different[:3])) + ("; …" if len(different) > 3 else "")
        raise FpnxError(
            f"{escape(path)} is from a run with other options or data ({shown}): give the same ones, start over with "
            "--overwrite, or name another output"
        )
