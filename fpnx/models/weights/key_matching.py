"""Finds the network that a state dict is for, and the prefix before the names of its parameters."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torchvision import models

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.models.backbones.factory import parameter_shapes
from fpnx.models.backbones.registry import TIMM, torchvision_names
from fpnx.models.weights.checkpoints import AVERAGES
from fpnx.models.weights.timm import classifier_names, filter_checkpoint

__all__ = ["NetworkMatch", "choose_prefix", "first_names", "match_backbone", "match_module", "tails"]

HEADS = ("fc.", "classifier.", "head.", "heads.", "aux1.", "aux2.", "AuxLogits.")  # of torchvision's classifiers
LARGE_HEADS = ("alexnet", "vgg")  # networks with most of their parameters in the head
CANDIDATES = 16  # number of backbones that a file is compared with: the nearest in number of parameters
LEAST_SIMILARITY = 0.5  # of a network that is taken for the right one, with errors that are to be named
# The first convolution of every torchvision network: it takes 3 channels, and shows where the network begins.
FIRST_CONVOLUTION = re.compile(
    r"(conv1(\.conv|\.0)?|conv_proj|Conv2d_1a_3x3\.conv|features\.(conv0|0|0\.0)|stem\.0(\.0)?|layers\.0)\.weight"
)
# The parts of torchvision's networks below their heads.
PARTS = re.compile(
    r"(conv\d|bn\d|layer\d|layers|features|stem|trunk_output|blocks|stage\d|inception\d\w|Mixed_\w+|Conv2d_\w+|norm"
    r"|class_token|conv_proj|encoder)(\.|$)"
)


@dataclass(frozen=True, kw_only=True)
class NetworkMatch:
    """How the parameters under a prefix of a state dict fit a network.

    Attributes:
        name: the network's.
        prefix: what stands before the names, such as `"encoder."`; `""` for nothing.
        state: the parameters, by the network's own names. Others are among them only if they stand within one of its
            parts: heads and other networks are left out.
        matched: number of the network's parameters that are there, in the right shape.
        missing: names of those that are not.
        similarity: `matched` as a share of the names in either; 1 where all fit.
        automatic: whether this prefix would have been taken without asking for it.
        beside: all prefixes under which parameters fit as well as any, this one included.
    """

    name: str
    prefix: str
    state: Mapping[str, Tensor]
    matched: int
    missing: tuple[str, ...]
    similarity: float
    automatic: bool = True
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Names:
    """The names of a network's parameters, in a form in which those of its variants are equal.

    Attributes:
        wanted: form of the name → own name and shape, of all parameters below the head.
        known: the forms of all names, head included.
        parts: the first components of the names below the head.
        flat: whether dots count as underscores, as in timm's `features_only` networks.
    """

    wanted: Mapping[str, tuple[str, tuple[int, ...]]]
    known: frozenset[str]
    parts: tuple[str, ...]
    flat: bool = False

    def form(self, name: str) -> str:
        if self.flat:
            return name.replace(".", "_")
        # Published DenseNet files have `norm.1` for `norm1`.
        return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def match_backbone(
    state: Mapping[str, Tensor], requested: str | None, asked: str | None = None, *, whole: bool = False
) -> NetworkMatch:
    """Find the backbone whose names and shapes are in `state`, or else the most similar one, and their prefix.

    Args:
        state: names → tensors.
        requested: the backbone's name; None finds it among torchvision's.
        asked: the prefix that the user names; None finds it.
        whole: `state` is that of a backbone alone: every other name in it is an error.

    Raises:
        FpnxError: it is of another backbone than `requested`, or of none; or several prefixes fit.
    """
    matches = [] if requested is None else _matches_of(state, requested, whole)
    if not any(match.similarity == 1.0 for match in matches):
        guesses = _guesses(state, whole) if requested is None or not requested.startswith(TIMM) else []
        exact = [guess for guess in guesses if guess.similarity == 1.0]
        if requested is None:
            matches = guesses
        elif exact:
            raise FpnxError(f"it is for {exact[0].name}, not for {requested}: drop --backbone or take another file")
    return _choose(matches, asked, state, requested)


def match_module(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str, asked: str | None
) -> NetworkMatch:
    """The same for the module `name` with parameters of these names and shapes.

    Raises:
        FpnxError: `state` is of another network, or several prefixes fit.
    """
    wanted = {key: (key, shape) for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}
    names = _Names(wanted, frozenset(shapes), tuple({key.partition(".")[0] for key in wanted}))
    match = _choose(_best_prefixes(state, names, name), asked, state, name)
    unknown = [key for key in match.state if key not in wanted]
    if unknown:
        raise FpnxError(f"it has names that {name} does not have: {first_names(unknown)}")
    return match


def choose_prefix(prefixes: Iterable[str], asked: str | None) -> tuple[str, bool]:
    """The one of `prefixes` that `--weights-prefix` means, and whether it would be taken without the option.

    `asked` is the whole prefix, or its beginning or end; None where the user names none. Without it, parameters go
    before their average (EMA).

    Raises:
        FpnxError: none or several of them are meant; names them.
    """
    found = sorted(dict.fromkeys(prefixes))
    default = [each for each in found if not AVERAGES.fullmatch(each)] or found
    meant = default if asked is None else _meant(found, asked)
    listed = " and ".join(escape(f"'{each}'") for each in found[:4]) + (" and others" if len(found) > 4 else "")
    if not meant:
        raise FpnxError(f"weights prefix {escape(str(asked))!r}: its parameters are under {listed}: take one of these")
    if len(meant) > 1:
        raise FpnxError(f"its parameters fit under several prefixes, {listed}: choose one with --weights-prefix")
    return meant[0], meant == default


def _meant(found: list[str], asked: str) -> list[str]:
    asked = asked if asked.endswith(".") or not asked else f"{asked}."
    if asked in found or not asked:
        return [asked] if asked in found else []
    return [each for each in found if each.startswith(asked)] or [each for each in found if each.endswith(f".{asked}")]


def tails(name: str) -> Iterator[tuple[str, str]]:
    """Every (prefix, rest) of a name that is cut behind a dot: `("", "a.b")` and `("a.", "b")`."""
    start = 0
    while True:
        yield name[:start], name[start:]
        start = name.find(".", start) + 1
        if not start:
            return


def first_names(names: Collection[str]) -> str:
    """The first three names, for a message."""
    return escape(", ".join([*names][:3]) + (", …" if len(names) > 3 else ""))


def _choose(
    matches: list[NetworkMatch], asked: str | None, state: Mapping[str, Tensor], requested: str | None
) -> NetworkMatch:
    best = max((match.similarity for match in matches), default=0.0)
    if best < LEAST_SIMILARITY:
        raise FpnxError(_why_none(matches, state, requested))
    fitting = {match.prefix: match for match in matches if match.similarity == best}
    if asked is None:
        return replace(fitting[choose_prefix(fitting, None)[0]], beside=tuple(fitting))
    meant = _meant([match.prefix for match in matches], asked)
    most = max((match.similarity for match in matches if match.prefix in meant), default=0.0)
    usable = {match.prefix: match for match in matches if match.prefix in meant and match.similarity == most}
    prefix, _ = choose_prefix(usable or fitting, asked)
    automatic = prefix in fitting and choose_prefix(fitting, prefix)[1]
    return replace(usable[prefix], automatic=automatic, beside=tuple(fitting))


def _why_none(matches: list[NetworkMatch], state: Mapping[str, Tensor], requested: str | None) -> str:
    listed = first_names(state)
    if requested is None:
        text = f"its names ({listed}) are of no backbone that fpnx knows: name the one that it is for with --backbone"
    else:
        text = f"its names ({listed}) are not those of {requested}"
    closest = max(matches, key=lambda match: match.matched, default=None)
    if closest is None or not closest.matched:
        return text
    under = f" under the prefix '{escape(closest.prefix)}'" if closest.prefix else ""
    wanted = closest.matched + len(closest.missing)
    return (
        f"{text}: at most {closest.matched} of {wanted} names of {closest.name} fit{under}, missing are "
        f"{first_names(closest.missing)}"
    )


@functools.lru_cache(maxsize=128)
def _names_of(backbone: str) -> _Names:
    shapes = {
        name: shape for name, shape in parameter_shapes(backbone).items() if not name.endswith("num_batches_tracked")
    }
    if backbone.startswith(TIMM):
        # A features_only network joins names of modules with underscores, or stands in an attribute `model`.
        wanted = {name.removeprefix("model.").replace(".", "_"): (name, shape) for name, shape in shapes.items()}
        known = classifier_names(backbone)
        tops = {name.partition(".")[0] for name in known}
        parts = tuple(top for top in tops if any(form.startswith(f"{top}_") or form == top for form in wanted))
        return _Names(wanted, frozenset(name.replace(".", "_") for name in known), parts, flat=True)
    below = {name: shape for name, shape in shapes.items() if not name.startswith(HEADS)}
    return _Names(
        {name: (name, shape) for name, shape in below.items()},
        frozenset(shapes),
        tuple({name.partition(".")[0] for name in below}),
    )


def _matches_of(state: Mapping[str, Tensor], backbone: str, whole: bool) -> list[NetworkMatch]:
    """The prefixes under which parameters of `backbone` stand, and how far they fit."""
    matches = _best_prefixes(state, _names_of(backbone), backbone, whole)
    if backbone.startswith(TIMM) and not any(match.similarity == 1.0 for match in matches):
        # Files of a network's authors have other names, which timm renames.
        prefix = _common_prefix(state)
        renamed = filter_checkpoint(backbone, {name[len(prefix) :]: value for name, value in state.items()})
        match = _compare(renamed, "", _names_of(backbone), backbone, whole)
        if match.similarity == 1.0:
            return [replace(match, prefix=prefix)]
    return matches


def _best_prefixes(state: Mapping[str, Tensor], names: _Names, network: str, whole: bool = False) -> list[NetworkMatch]:
    counts: Counter[str] = Counter()
    for name, value in state.items():
        for prefix, rest in tails(name):
            entry = names.wanted.get(names.form(rest))
            counts[prefix] += entry is not None and entry[1] == tuple(value.shape)
    most = max(counts.values(), default=0)
    good = [prefix for prefix, count in counts.items() if count and 2 * count >= most]
    return [_compare(state, prefix, names, network, whole) for prefix in good]


def _compare(state: Mapping[str, Tensor], prefix: str, names: _Names, network: str, whole: bool) -> NetworkMatch:
    kept: dict[str, Tensor] = {}
    fitting: set[str] = set()
    for full, value in state.items():
        if not full.startswith(prefix) or full.endswith("num_batches_tracked"):
            continue
        rest = full[len(prefix) :]
        form = names.form(rest)
        if form in names.wanted:
            own, shape = names.wanted[form]
            kept[own] = value
            fitting |= {own} if tuple(value.shape) == shape else set()
        elif form not in names.known and (whole or rest.partition(".")[0] in names.parts):
            kept[rest] = value
    wanted = [own for own, _ in names.wanted.values()]
    missing = tuple(own for own in wanted if own not in fitting)
    return NetworkMatch(
        name=network,
        prefix=prefix,
        state=kept,
        matched=len(fitting),
        missing=missing,
        similarity=len(fitting) / max(len(wanted) + len(kept) - len(fitting), 1),
    )


def _guesses(state: Mapping[str, Tensor], whole: bool) -> list[NetworkMatch]:
    """For each prefix under which a torchvision network may begin, the most similar one."""
    prefixes = dict.fromkeys(
        prefix
        for name, value in state.items()
        if value.dim() == 4 and value.shape[1] == 3
        for prefix, rest in tails(name)
        if FIRST_CONVOLUTION.fullmatch(rest)
    )
    shared = [prefix for prefix, _ in tails(_common_prefix(state))]
    return [_most_similar(state, prefix, whole) for prefix in prefixes or shared]


def _most_similar(state: Mapping[str, Tensor], prefix: str, whole: bool) -> NetworkMatch:
    inner = {name: value for name, value in state.items() if name.startswith(prefix)}
    parameters = sum(
        value.numel() for name, value in inner.items() if "running_" not in name and PARTS.match(name[len(prefix) :])
    )
    near = sorted(torchvision_names(), key=lambda name: abs(_parameters(name) - parameters))[:CANDIDATES]
    near += [name for name in torchvision_names() if name.startswith(LARGE_HEADS) and name not in near]
    best: NetworkMatch | None = None
    for name in near:
        match = _compare(inner, prefix, _names_of(name), name, whole)
        if best is None or match.similarity > best.similarity:
            best = match
        if match.similarity == 1.0:
            break
    assert best is not None
    return best


def _parameters(backbone: str) -> int:
    return int(models.get_model_weights(backbone).DEFAULT.meta["num_params"])


def _common_prefix(names: Iterable[str]) -> str:
    """The components with which all names begin."""
    first, last = min(names), max(names)  # what both begin with, those between begin with
    return [prefix for prefix, _ in tails(first) if last.startswith(prefix)][-1]
