"""Rounding weights so that each error is taken up by the weights that are still to be rounded (GPTQ).

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", after Optimal
Brain Surgeon: of all codes q, those are looked for whose outputs differ least,

    min tr((W - Q) C (W - Q)^T),    C = sum of x x^T over the inputs x

Columns are rounded one after the other, of each group those with the largest inputs first. The error of a column times
row i of U, C^-1 = U^T U, over U_ii, is taken from the columns behind it: what is least for the outputs.

Where the inputs x are quantized, and z is what they were, the outputs W z are best made by other weights:

    min sum |W z - V x|^2,    V = W (sum of z x^T) C^-1

and these are rounded (Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration").
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.core.fake_quant import NumBits, fake_quantize

__all__ = ["compensated", "output_error"]

#: Added to the diagonal of C, as a fraction of its mean; of the second, tenfold until C has an inverse.
_DAMPING, _MOST_DAMPING = 0.01, 1e3

#: Columns whose errors are taken from all behind them at once.
_COLUMNS = 48


def _inverse_root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """U [G, n, n], upper triangular, of the inverse of the damped ``covariance``; and what was added to its diagonal.

    The latter, [G], is infinite where there is no inverse: U is the identity, and nothing is taken up.
    """
    mean = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    nothing = torch.eye(covariance.shape[1], device=covariance.device)
    damping = torch.full_like(mean, _DAMPING)  # of each group, whatever the others need
    while True:
        damped = covariance.clone()
        damped.diagonal(dim1=1, dim2=2).add_((damping * mean).unsqueeze(1))
        root, singular = torch.linalg.cholesky_ex(damped)
        root = torch.where((singular != 0)[:, None, None], nothing, root)
        upper, unlike = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
        failed = (singular != 0) | (unlike != 0)
        if not bool(failed.any()) or float(damping.max()) > _MOST_DAMPING:
            upper = torch.where(failed[:, None, None], nothing, upper)
            return upper, torch.where(failed, torch.inf, damping * mean)
        damping = torch.where(failed, 10 * damping, damping)


def _regressed(left: Tensor, crossed: Tensor, upper: Tensor, added: Tensor) -> Tensor:
    """V^T [G, n, O], of W^T = ``left``; the damping keeps it near W, where the inputs tell little."""
    known = added.isfinite()
    damped = crossed.clone()
    damped.diagonal(dim1=1, dim2=2).add_(torch.where(known, added, 0.0).unsqueeze(1))
    made = upper.transpose(1, 2) @ (upper @ (damped.transpose(1, 2) @ left))
    return torch.where(known[:, None, None], made, left)


def compensated(
    weight: Tensor, scale: Tensor, covariance: Tensor, num_bits: NumBits, crossed: Tensor | None = None
) -> Tensor:
    """The values that a weight is rounded to.

    Args:
        weight: [G, O, n], of G groups of O outputs and n inputs each.
        scale: [G, O, 1] or [1, 1, 1] float32, positive.
        covariance: [G, n, n] float32, C of each group.
        num_bits: The format.
        crossed: [G, n, n] float32, sum of z x^T of each group; None where the inputs are not quantized, or finely.

    Returns:
        [G, O, n] float32: codes times ``scale``.
    """
    order = covariance.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True).unsqueeze(2)  # [G, n, 1]

    def ordered(products: Tensor) -> Tensor:
        return products.take_along_dim(order, 1).take_along_dim(order.transpose(1, 2), 2)

    # inputs first: what belongs to one column of the weight lies side by side
    left = weight.float().transpose(1, 2).take_along_dim(order, 1)
    upper, added = _inverse_root(ordered(covariance))
    if crossed is not None:
        left = _regressed(left, ordered(crossed), upper, added)
    scale = scale.squeeze(2)
    values = torch.empty_like(left)
    columns = left.shape[1]
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        part, root = left[:, start:end].clone(), upper[:, start:end, start:end]
        errors = torch.empty_like(part)
        behind, inverse = root.transpose(1, 2), root.diagonal(dim1=1, dim2=2)[:, :, None].reciprocal().unbind(1)
        places = zip(part.unbind(1), values[:, start:end].unbind(1), errors.unbind(1), inverse, strict=True)
        for i, (own, rounded, error, factor) in enumerate(places):
            rounded.copy_(fake_quantize(own, scale, None, num_bits))
            torch.sub(own, rounded, out=error).mul_(factor)
            part[:, i + 1 :].baddbmm_(behind[:, i + 1 :, i : i + 1], error.unsqueeze(1), alpha=-1)
        left[:, end:].baddbmm_(upper[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    return values.take_along_dim(order.argsort(1), 1).transpose(1, 2)


def output_error(weight: Tensor, values: Tensor, covariance: Tensor, crossed: Tensor | None = None) -> Tensor:
    """The squared error of the outputs, summed over inputs and groups, less what it would be with the weight as it is.

    Args:
        weight: W, [G, O, n] float32.
        values: Q, [G, O, n] float32, what it is rounded to.
        covariance: C, [G, n, n] float32.
        crossed: As for :func:`compensated`.
    """
    difference = values - weight
    product = difference @ covariance
    if crossed is not None:
        product += 2 * (weight @ (covariance - crossed))
    return (product * difference).sum(dtype=torch.float64)
