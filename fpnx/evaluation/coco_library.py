"""faster-coco-eval, which has the numbers of pycocotools, imported where it is used."""

from __future__ import annotations

from typing import Any

from fpnx.core.errors import FpnxError

__all__ = ["evaluation_classes", "mask_functions"]

MISSING = "scores of boxes and masks need faster-coco-eval, which is not installed: pip install 'fpnx[train]'"


def evaluation_classes() -> tuple[Any, Any]:
    """`COCO` and `COCOeval_faster`.

    Raises:
        FpnxError: where faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise FpnxError(MISSING) from None
    return COCO, COCOeval_faster


def mask_functions() -> Any:
    """The module with `encode`, `decode`, `area`, `frPyObjects` and `merge` of masks as runs.

    Raises:
        FpnxError: where faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise FpnxError(MISSING) from None
    return mask
