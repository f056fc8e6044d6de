"""faster-coco-eval, which has the numbers of pycocotools, imported where it is used."""

from __future__ import annotations

from typing import Any

from fpnx.core.errors import FpnxError

__all__ = ["coco_library"]


def coco_library() -> Any:
    """The module, with `COCO`, `COCOeval_faster` and `mask`.

    Raises:
        FpnxError: faster-coco-eval is not installed.
    """
    try:
        import faster_coco_eval
    except ImportError:
        raise FpnxError(
            "scores of boxes need faster-coco-eval, which is not installed: pip install 'fpnx[train]'"
        ) from None
    return faster_coco_eval
