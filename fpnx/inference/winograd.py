"""3×3 convolutions by Winograd's minimal filtering F(4×4, 3×3): a quarter of the multiplications.

Tiles of 6×6 inputs give 4×4 outputs: Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, for an input tile d and a kernel g, summed over
channels before the last step (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308, Eq. 12). The matrices are those of
the Cook-Toom algorithm at the points 0, ±2/3, ±3/2 and ∞, at which float32 is as accurate as direct convolution; the
usual points 0, ±1, ±2 and ∞ lose a digit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["WinogradConvolution"]

KERNEL, OUTPUT = 3, 4  # sides of the kernel, and of the part of the output that a tile gives
TILE = OUTPUT + KERNEL - 1
POINTS = tuple(Fraction(*each) for each in ((0, 1), (2, 3), (-2, 3), (3, 2), (-3, 2)))  # and ∞

# Measured on two processors with one thread: below these it is no faster than oneDNN's direct convolution.
LEAST_CHANNELS = 128
LEAST_TILES = 4  # along each side of a map
MOST_WASTE = 1.45  # computed outputs by those that are needed, where sides are no multiples of 4
TILES_AT_ONCE = 112  # enough for fast matrix products, few enough for the cache

Matrix = list[list[Fraction]]


class WinogradConvolution:
    """A convolution of 3×3, stride 1, on the CPU in float32, as matrix products.

    Its result for an image depends neither on other images of the batch nor on the number of threads.

    Args:
        weight: (out, in, 3, 3), float32.

    Attributes:
        matrices: (36, in, out), float32: the weight of each of the tile's points.
    """

    def __init__(self, weight: Tensor) -> None:
        _, transform, _ = _transforms()
        kernels = torch.einsum("ai,kcij,bj->abck", transform, weight.double(), transform)
        self.matrices = kernels.flatten(0, 1).float().contiguous()

    @staticmethod
    def is_faster(weight_shape: Sequence[int], padding: tuple[int, int], size: tuple[int, int]) -> bool:
        """Whether to take it, rather than direct convolution, for a weight (out, in, 3, 3) and maps of a size.

        It depends on nothing else, so that the same image always has the same features.
        """
        sides = [length + 2 * pad - KERNEL + 1 for length, pad in zip(size, padding, strict=True)]
        if min(weight_shape[:2]) < LEAST_CHANNELS or min(sides) < 1:
            return False
        tiles = [math.ceil(side / OUTPUT) for side in sides]
        computed = math.prod(tiles) * OUTPUT**2
        return min(tiles) >= LEAST_TILES and computed <= MOST_WASTE * math.prod(sides)

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None,
        padding: tuple[int, int],
        other: Tensor | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        *,
        accumulates: bool = False,
    ) -> Tensor:
        """activation(convolution + bias [+ other]), (B, out, height, width) in channels-last layout.

        Args:
            x: (B, in, height, width), float32.
            padding: zeros above and below, left and right.
            other: of the result's shape.
            accumulates: whether `other` may be overwritten with the result.
        """
        height, width = (x.shape[axis + 2] + 2 * padding[axis] - KERNEL + 1 for axis in (0, 1))
        down, across = math.ceil(height / OUTPUT), math.ceil(width / OUTPUT)
        rows = math.ceil(down / math.ceil(down * across / TILES_AT_ONCE))
        images = min(len(x), max(1, TILES_AT_ONCE // (down * across)))
        inner, outer = x.shape[1], self.matrices.shape[2]
        pixels = x.permute(0, 2, 3, 1)
        added = None if other is None else other.permute(0, 2, 3, 1)
        result = added if accumulates and added is not None else x.new_empty(len(x), height, width, outer)
        work = _Buffers(x, images, rows, across, inner, outer)
        for first in range(0, len(x), images):
            chosen = slice(first, first + images)
            for row in range(0, down, rows):
                strip = slice(row * OUTPUT, min(height, (row + rows) * OUTPUT))
                block = self._strip(pixels[chosen], strip, padding, work)[:, :, :width]
                if bias is not None:
                    block += bias
                if added is not None:
                    block += added[chosen, strip]
                result[chosen, strip] = block if activation is None else activation(block)
        return result.permute(0, 3, 1, 2)

    def _strip(self, pixels: Tensor, strip: slice, padding: tuple[int, int], work: _Buffers) -> Tensor:
        """Rows of the output of some images: (images, rows, width up to the last tile, out), in a buffer."""
        inputs, outputs = _products()
        images, height, width, inner = pixels.shape
        outer, rows = self.matrices.shape[2], math.ceil((strip.stop - strip.start) / OUTPUT)
        above, left = strip.start - padding[0], padding[1]
        padded = work.padded[:images, : rows * OUTPUT + KERNEL - 1]
        top, bottom = max(0, above), min(height, above + padded.shape[1])
        padded[:, : top - above] = 0
        padded[:, bottom - above :] = 0
        padded[:, top - above : bottom - above, left : left + width] = pixels[:, top:bottom]
        tiles = (images, rows, work.across)
        count = math.prod(tiles)
        by_image, by_row, by_column, _ = padded.stride()
        steps = (by_row, by_column, by_image, OUTPUT * by_row, OUTPUT * by_column, 1)
        gathered = work.take("gathered", TILE, TILE, *tiles, inner)
        gathered.copy_(padded.as_strided(gathered.shape, steps))
        points = torch.mm(inputs, gathered.view(TILE**2, -1), out=work.take("points", TILE**2, count * inner))
        sums = torch.bmm(
            points.view(TILE**2, count, inner), self.matrices, out=work.take("sums", TILE**2, count, outer)
        )
        parts = torch.mm(outputs, sums.view(TILE**2, -1), out=work.take("parts", OUTPUT**2, count * outer))
        block = work.take("block", images, rows, OUTPUT, work.across, OUTPUT, outer)
        block.copy_(parts.view(OUTPUT, OUTPUT, *tiles, outer).permute(2, 3, 0, 4, 1, 5))
        return block.view(images, rows * OUTPUT, work.across * OUTPUT, outer)[:, : strip.stop - strip.start]


class _Buffers:
    """Memory of a call, used again by each strip.

    Attributes:
        across: tiles along the width.
        padded: (images, height, width, in), a strip of the input with zeros around it.
    """

    def __init__(self, x: Tensor, images: int, rows: int, across: int, inner: int, outer: int) -> None:
        self.across = across
        count = images * rows * across
        self.padded = x.new_zeros(images, rows * OUTPUT + KERNEL - 1, across * OUTPUT + KERNEL - 1, inner)
        self._first = x.new_empty(TILE**2 * count * max(inner, outer))
        self._second = x.new_empty(count * max(TILE**2 * inner, OUTPUT**2 * outer))
        self._block = x.new_empty(OUTPUT**2 * count * outer)
        self._places = {"gathered": self._first, "points": self._second, "sums": self._first, "parts": self._second}

    def take(self, name: str, *shape: int) -> Tensor:
        """A buffer of a shape."""
        place = self._block if name == "block" else self._places[name]
        return place[: math.prod(shape)].view(shape)


@functools.cache
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Bᵀ (6, 6), G (6, 3) and Aᵀ (4, 6), float64.

    Rows of G and Bᵀ are scaled against each other by powers of two, so that both have values of similar size.
    """
    inputs, kernel, outputs = _cook_toom(POINTS)
    matrices = [
        torch.tensor([[float(x) for x in row] for row in each], dtype=torch.float64) for each in (inputs, kernel)
    ]
    ratio = matrices[1].abs().amax(1) / matrices[0].abs().amax(1)
    scale = torch.exp2((ratio.log2() / 2).round())[:, None]
    transform = torch.tensor([[float(x) for x in row] for row in outputs], dtype=torch.float64)
    return matrices[0] * scale, matrices[1] / scale, transform


@functools.cache
def _products() -> tuple[Tensor, Tensor]:
    """The transforms of two axes at once: (36, 36) of inputs and (16, 36) of outputs, float32."""
    inputs, _, outputs = _transforms()
    return torch.kron(inputs, inputs).float(), torch.kron(outputs, outputs).float()


def _cook_toom(points: Sequence[Fraction]) -> tuple[Matrix, Matrix, Matrix]:
    """Bᵀ, G and Aᵀ of the Cook-Toom algorithm at these points and ∞.

    The output's polynomial is interpolated from products of values of two polynomials (Lagrange); transposed, that is
    a correlation. Row i of Aᵀ has the i-th powers of the points, row j of G the first powers of point j divided by the
    product of its differences to the others, row j of Bᵀ the coefficients of the product of (x − p) over the others.
    """
    rows = range(len(points))
    outputs = [[p**i for p in points] + [Fraction(i == OUTPUT - 1)] for i in range(OUTPUT)]
    others = [[points[i] for i in rows if i != j] for j in rows]
    kernel = [
        [points[j] ** k / math.prod((points[j] - p for p in others[j]), start=Fraction(1)) for k in range(KERNEL)]
        for j in rows
    ]
    inputs = [[*_monic(others[j]), Fraction(0)] for j in rows]
    return [*inputs, _monic(points)], [*kernel, [Fraction(k == KERNEL - 1) for k in range(KERNEL)]], outputs


def _monic(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x − root), from the constant one up."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [*(-root * each for each in coefficients), Fraction(0)]
        coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients
