"""Batch norms that follow a convolution become part of it: fewer nodes, and weights that are rounded as they are used.

W' = W · γ/√(σ² + ε), b' = (b − μ) · γ/√(σ² + ε) + β, by output channel (Jacob et al. 2018, "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", sec. 3.2).
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(model: nn.Module) -> None:
    """Fold every norm into the convolution before it, in the layers of ResNet and MobileNet; outputs stay as they were."""
    for module in list(model.modules()):
        convolution = getattr(module, "convolution", None)
        norm = getattr(module, "normalization", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.convolution = fuse_conv_bn_eval(convolution, norm)
            module.normalization = nn.Identity()
