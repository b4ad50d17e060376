"""Rounding weights so that each error is taken up by the weights that are still to be rounded (GPTQ).

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", after Optimal
Brain Surgeon: of all codes q, those are looked for whose outputs differ least,

    min tr((W - Q) C (W - Q)^T),    C = sum of x x^T over the inputs x

Columns are rounded one after the other, of each group those with the largest inputs first. The error of a column times
row i of U, C^-1 = U^T U, over U_ii, is taken from the columns behind it: what is least for the outputs.
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


def _inverse_root(covariance: Tensor) -> Tensor:
    """U [G, n, n], upper triangular, of the inverse of the damped ``covariance``."""
    mean = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    nothing = torch.eye(covariance.shape[1], device=covariance.device)  # is taken up
    damping = torch.full_like(mean, _DAMPING)  # of each group, whatever the others need
    while True:
        damped = covariance.clone()
        damped.diagonal(dim1=1, dim2=2).add_((damping * mean).unsqueeze(1))
        root, singular = torch.linalg.cholesky_ex(damped)
        root = torch.where((singular != 0)[:, None, None], nothing, root)
        upper, unlike = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
        failed = (singular != 0) | (unlike != 0)
        if not bool(failed.any()) or float(damping.max()) > _MOST_DAMPING:
            return torch.where(failed[:, None, None], nothing, upper)
        damping = torch.where(failed, 10 * damping, damping)


def compensated(weight: Tensor, scale: Tensor, covariance: Tensor, num_bits: NumBits) -> Tensor:
    """The values that a weight is rounded to.

    Args:
        weight: [G, O, n], of G groups of O outputs and n inputs each.
        scale: [G, O, 1] or [1, 1, 1] float32, positive.
        covariance: [G, n, n] float32, C of each group.
        num_bits: The format.

    Returns:
        [G, O, n] float32: codes times ``scale``.
    """
    order = covariance.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True).unsqueeze(2)  # [G, n, 1]
    # inputs first: what belongs to one column of the weight lies side by side
    left = weight.float().transpose(1, 2).take_along_dim(order, 1)
    upper = _inverse_root(covariance.take_along_dim(order, 1).take_along_dim(order.transpose(1, 2), 2))
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


def output_error(difference: Tensor, covariance: Tensor) -> Tensor:
    """tr(D C D^T), summed over groups: the squared error of the outputs, where weights differ by D.

    Args:
        difference: D, [G, O, n] float32.
        covariance: C, [G, n, n] float32.
    """
    return ((difference @ covariance) * difference).sum(dtype=torch.float64)
