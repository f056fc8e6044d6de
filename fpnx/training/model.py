"""The model that is trained: built from options, or from what a file of maps says it was made with."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fpnx.core.config import ExtractConfig
from fpnx.core.errors import FpnxError
from fpnx.core.option_groups import InputConfig, ModelConfig
from fpnx.core.provenance import ModelPart
from fpnx.core.text import escape
from fpnx.core.train_config import TrainConfig
from fpnx.extraction.plan import fingerprint_fields
from fpnx.extraction.recompute import recompute_options
from fpnx.models.factory import NeckPlan, build_model
from fpnx.models.heads.base import Head
from fpnx.models.pyramid_model import PyramidModel
from fpnx.store.reader import Store, different_fields

__all__ = ["check_maps", "model_for_images", "model_of_store"]

ABOVE_MAPS = ("levels", "pyramid", "channels", "top_block", "tap", "seed", "offline", "weights")
OF_BODY = ("backbone", "weights", "norm_eps", "stride_in_1x1", "blocks", "recipe")  # fields of a store's config


def model_for_images(config: TrainConfig, head: type[Head]) -> PyramidModel:
    """The model that options ask for, with the levels of the head by default."""
    model = _built(config, head, config.neck_variant)
    model.recipe = model.recipe.sized(config)
    return model


def model_of_store(store: Store, config: TrainConfig, head: type[Head]) -> PyramidModel:
    """The model whose maps a file holds, with the pyramid that options ask for.

    Raises:
        FpnxError: the file does not say how it was made, the weights are others, or an option is about the backbone.
    """
    defaults = TrainConfig()
    own = {each.name for part in (ModelConfig, InputConfig) for each in fields(part)} - set(ABOVE_MAPS)
    for name in sorted(own):
        if getattr(config, name) != getattr(defaults, name):
            option = name.replace("_", " ")
            raise FpnxError(f"{option} beside a file of maps, which has its own: leave {option} out")
    given = None if config.weights == defaults.weights else config.weights
    made_with = ExtractConfig(**recompute_options(store, None, given, "cpu", config.offline))
    kind = store.pyramid if store.pyramid in ("image", "simple") and config.pyramid is None else config.pyramid
    asked = replace(
        made_with,
        pyramid=kind,
        levels=config.levels,
        channels=config.channels,
        top_block=config.top_block,
        tap=config.tap or (made_with.tap if kind in ("image", "simple") else None),
        pool="none",
    )
    model = _built(asked, head, config.neck_variant)
    model.recipe = model.recipe.sized(made_with)
    now = fingerprint_fields(model, model.recipe, made_with)
    before = {name: value for name, value in store.config.items() if name in OF_BODY}
    different = different_fields(before, {name: value for name, value in now.items() if name in OF_BODY})
    if different:
        raise FpnxError(
            f"the weights of {escape(store.path)} are not here ({'; '.join(map(escape, different))}): name their file "
            "with --weights"
        )
    if model.weights.fpn.seed is not None:
        model.fpn.initialize(config.seed)
        model.weights = replace(model.weights, fpn=ModelPart.drawn(config.seed))
        model.note_parameters()
    return model


def check_maps(store: Store, levels: tuple[str, ...]) -> None:
    """Refuse a file that does not hold the maps `levels`, or holds them pooled.

    Raises:
        FpnxError: naming what is missing.
    """
    if store.config["pool"] != "none":
        raise FpnxError(
            f"{escape(store.path)} holds pooled maps ({store.config['pool']}): extract it again without --pool"
        )
    missing = [name for name in levels if name not in store.levels]
    if missing:
        needed = ",".join(levels)
        raise FpnxError(
            f"{escape(store.path)} has {', '.join(store.levels)}, and {', '.join(missing)} is needed too: extract it "
            f"again with --levels {needed}, or take other --levels or --pyramid here"
        )


def _built(config: Any, head: type[Head], variant: str) -> PyramidModel:
    plan = NeckPlan(levels=head.default_levels, top_block=head.default_top_block, variant=variant)
    if config.pyramid == "image" and head.kind != "classify":
        config = replace(config, channels=None)  # they are those of the head
    return build_model(config, plan=plan)
