"""Named presets, each with its reason: a spec for people who know their target, not the literature."""

from __future__ import annotations

from dataclasses import dataclass

from app.spec.base import Family
from app.spec.compression import Acceptance, CompressionSpec
from app.spec.distill import DistillLogits, StudentFromPreviousStep
from app.spec.optimize import OptimizeOnnx
from app.spec.prune import PruneDepth, PruneMagnitude
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights


@dataclass(frozen=True)
class Recipe:
    """A spec with a name and the reason to choose it."""

    name: str
    summary: str
    reason: str
    spec: CompressionSpec
    families: frozenset[Family] = frozenset(Family)


_ALL = (
    Recipe(
        name="int8",
        summary="8-bit weights, one scale per output channel",
        reason="Halves a 16-bit model and is nearly lossless, calibrated on a few pages of text. The safe first choice.",
        spec=CompressionSpec(
            steps=(QuantizeCalibrated(bits=8, calibration_tokens=4096),),
            acceptance=Acceptance(max_perplexity_increase=0.01, min_cosine=0.99),
        ),
    ),
    Recipe(
        name="int4",
        summary="4-bit weights, groups of 32, asymmetric",
        reason="A quarter of the block weights of a 16-bit model. Small groups keep quality without calibration data.",
        spec=CompressionSpec(
            steps=(QuantizeWeights(bits=4, group_size=32, symmetric=False),),
            acceptance=Acceptance(max_perplexity_increase=0.15, min_cosine=0.95),
        ),
    ),
    Recipe(
        name="sparse-2-4",
        summary="2:4 sparsity by magnitude",
        reason="For hardware that skips two of four weights. Without training afterwards the quality loss is large.",
        spec=CompressionSpec(steps=(PruneMagnitude(pattern="2:4"),)),
    ),
    Recipe(
        name="shallow",
        summary="Remove the fifth of the blocks that changes its input least",
        reason="Smaller and faster everywhere, without any special runtime; loses quality, so distil afterwards.",
        spec=CompressionSpec(steps=(PruneDepth(drop_ratio=0.2),)),
    ),
    Recipe(
        name="shallow-distilled",
        summary="Remove a fifth of the blocks, then teach what is left by the original",
        reason="Recovers part of what depth pruning loses. Give it your own training text.",
        spec=CompressionSpec(
            steps=(PruneDepth(drop_ratio=0.2), DistillLogits(student=StudentFromPreviousStep())),
        ),
    ),
    Recipe(
        name="onnx-cpu",
        summary="ONNX with dynamic int8, for CPUs",
        reason="The quickest way to serve an encoder on CPUs: onnxruntime, no PyTorch at run time.",
        spec=CompressionSpec(steps=(OptimizeOnnx(),), acceptance=Acceptance(min_cosine=0.95)),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
