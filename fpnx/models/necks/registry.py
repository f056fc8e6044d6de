"""The necks by name, as `--pyramid` takes them."""

from __future__ import annotations

from fpnx.models.necks.base import Neck
from fpnx.models.necks.bifpn import BiFPN
from fpnx.models.necks.fpn import FPN
from fpnx.models.necks.image_pyramid import ImagePyramid
from fpnx.models.necks.nasfpn import NASFPN
from fpnx.models.necks.pafpn import PAFPN
from fpnx.models.necks.simple import SimplePyramid

__all__ = ["NECKS"]

NECKS: dict[str, type[Neck]] = {
    "fpn": FPN,
    "pafpn": PAFPN,
    "bifpn": BiFPN,
    "nasfpn": NASFPN,
    "simple": SimplePyramid,
    "image": ImagePyramid,
}
