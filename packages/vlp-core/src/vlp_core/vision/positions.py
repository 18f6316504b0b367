"""Position tables for another image size.

Source: X-VLM models/swin_transformer.py `interpolate_relative_pos_embed` (from BEiT) and models/vit.py
`interpolate_pos_embed`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_swin_table(table: Tensor, target_window: int) -> Tensor:
    """Relative position bias of a Swin block for another window.

    `table`: [(2w-1)^2, heads] for window w >= 3 -> [(2t-1)^2, heads] for t = `target_window`, same dtype.

    The source's distances 0, 1, 2 ... are stretched to a geometric sequence 0, 1, 1+q, 1+q+q^2 ... that spans
    the target's, so near distances keep their bias; a cubic spline through them is read at integer distances.
    Targets beyond the last source are clamped. Raises `ValueError` for a table that is not square or too
    small for a cubic spline.
    """
    from scipy.interpolate import RectBivariateSpline

    side = math.isqrt(len(table))
    if table.ndim != 2 or side * side != len(table) or side % 2 == 0:
        raise ValueError(f"a table of shape {list(table.shape)} is not of the form [(2w-1)^2, heads]")
    target_side = 2 * target_window - 1
    if side == target_side:
        return table
    if side <= 3:
        raise ValueError(
            f"a table for window {(side + 1) // 2} cannot be resized to window {target_window}: 3 is the "
            "smallest"
        )
    ratio = _ratio(side // 2, target_side // 2)
    distances = [0.0]
    for i in range(side // 2):
        distances.append(distances[-1] + ratio**i)
    known = [-distance for distance in reversed(distances[1:])] + distances
    wanted = list(range(-(target_side // 2), target_side // 2 + 1))
    values = table.detach().to("cpu", torch.float64).view(side, side, -1).numpy()
    resized = [
        torch.from_numpy(
            RectBivariateSpline(known, known, values[:, :, head], kx=3, ky=3, s=0)(wanted, wanted)
        ).flatten()
        for head in range(values.shape[2])
    ]
    return torch.stack(resized, dim=1).to(table)


def _ratio(terms: int, total: int) -> float:
    """q in (1.01, 1.5) with 1 + q + ... + q^(terms-1) = total, by bisection to 1e-6 (the reference's bounds,
    also where none fits)."""
    low, high = 1.01, 1.5
    q = (low + high) / 2
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q**terms) / (1 - q) > total:
            high = q
        else:
            low = q
    return q


def resize_position_table(table: Tensor, grid: int) -> Tensor:
    """Absolute positions of a ViT for another grid.

    `table`: [1+g*g, D], class token first -> [1+grid*grid, D], same dtype; the class token's row is kept, the
    others are interpolated bicubically in float32 (corners not aligned). Raises `ValueError` for a table that
    is not a square grid.
    """
    side = math.isqrt(max(len(table) - 1, 0))
    if table.ndim != 2 or side == 0 or side * side != len(table) - 1:
        raise ValueError(f"a table of shape {list(table.shape)} is not of the form [1+g*g, width]")
    if side == grid:
        return table
    patches = table[1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], patches[0].flatten(1).t().to(table)])


def sincos_table(width: int, grid: int) -> Tensor:
    """Fixed positions of a masked auto-encoder's decoder: [1+grid*grid, width], float32, the class token's
    row first and zero.

    The first half of the channels encodes the column, the second half the row; within each, sines then
    cosines of frequencies 10000^(-k / (width/4)). Source: MAE, arXiv 2111.06377, `util/pos_embed.py`. Raises
    `ValueError` for a width not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"width={width} must be a multiple of 4: sine and cosine of columns and rows")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = waves.repeat(grid, 1)
    rows = waves.repeat_interleave(grid, dim=0)
    table = torch.cat([columns, rows], dim=1).float()
    return torch.cat([table.new_zeros(1, width), table])
