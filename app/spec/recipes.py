"""Named presets, each with its reason: a spec for people who know their target, not the literature."""

from __future__ import annotations

from dataclasses import dataclass

from app.spec.base import TEXT_FAMILIES, Family, Frozen
from app.spec.compression import Acceptance, CompressionSpec, DatasetId, TextSource
from app.spec.distill import DistillLogits, StudentFromPreviousStep
from app.spec.gguf import QuantizeGguf
from app.spec.optimize import OptimizeOnnx
from app.spec.prune import PruneCalibrated, PruneDepth
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from app.spec.quantize_onnx import QuantizeOnnx


class RecipeDatasets(Frozen):
    """Datasets of your own for a recipe; models of images need them, since none ship with Modelpress."""

    calibration: DatasetId | None = None
    """Id of what to calibrate on, in recipes that do."""
    training: DatasetId | None = None
    """Id of what to train on, in recipes that do."""
    evaluation: DatasetId | None = None
    """Id of what to judge the result on. Not what it was calibrated or trained on."""


@dataclass(frozen=True)
class Recipe:
    """A spec with a name and the reason to choose it."""

    name: str
    summary: str
    reason: str
    spec: CompressionSpec
    families: frozenset[Family] = TEXT_FAMILIES

    def on(self, datasets: RecipeDatasets) -> CompressionSpec:
        """The spec, to be carried out on these datasets."""
        text = TextSource(dataset=datasets.evaluation)
        return self.spec.model_copy(
            update={
                "calibration": TextSource(dataset=datasets.calibration),
                "training": TextSource(dataset=datasets.training),
                "evaluation": self.spec.evaluation.model_copy(update={"text": text}),
            }
        )


_OF_IMAGES = frozenset({Family.IMAGE_CLASSIFIER})

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
        name="llama.cpp-q4",
        summary="GGUF Q4_K_M for llama.cpp, Ollama and LM Studio",
        reason="One file that runs on laptops, phones and Macs: the size of llama.cpp's own Q4_K_M, closer to the original.",
        spec=CompressionSpec(
            steps=(QuantizeGguf(mix="Q4_K_M"),), acceptance=Acceptance(max_perplexity_increase=0.1)
        ),
        families=frozenset({Family.CAUSAL_LM}),
    ),
    Recipe(
        name="vllm-int4",
        summary="4-bit weights for vLLM, calibrated, in the largest groups it has kernels for that divide the model's inputs",
        reason="The least memory at good quality on any GPU that vLLM runs on; quickest where few requests run at once.",
        spec=CompressionSpec(
            steps=(QuantizeCalibrated(bits=4, group_size="auto"),),
            acceptance=Acceptance(max_perplexity_increase=0.15, min_cosine=0.95),
        ),
    ),
    Recipe(
        name="vllm-w8a8",
        summary="8-bit integer weights and activations for vLLM, calibrated and smoothed; scales of activations found per token",
        reason="Integer arithmetic, for throughput on GPUs from Turing and Ampere on, which have no FP8.",
        spec=CompressionSpec(
            steps=(QuantizeCalibrated(bits=8, activations="dynamic", scaling="smoothquant"),),
            acceptance=Acceptance(max_perplexity_increase=0.03, min_cosine=0.98),
        ),
    ),
    Recipe(
        name="vllm-fp8",
        summary="FP8 weights per output channel and FP8 activations per token for vLLM",
        reason="Throughput on GPUs from Ada and Hopper on, without calibration data. Nearly lossless.",
        spec=CompressionSpec(
            steps=(QuantizeWeights(number_format="fp8", activations="dynamic"),),
            acceptance=Acceptance(max_perplexity_increase=0.03, min_cosine=0.98),
        ),
    ),
    Recipe(
        name="smallest",
        summary="3-bit weights with zero points, calibrated, in large groups",
        reason="The fewest bytes that leave most models usable. Give it your own calibration text, and read the report.",
        spec=CompressionSpec(
            steps=(
                QuantizeCalibrated(bits=3, group_size="auto", symmetric=False, calibration_tokens=32_768),
            ),
        ),
    ),
    Recipe(
        name="sparse-2-4",
        summary="2:4 sparsity, calibrated: what stays makes up for what goes",
        reason="For hardware that skips two of four weights. Large models bear it; small ones need training afterwards.",
        spec=CompressionSpec(steps=(PruneCalibrated(pattern="2:4"),)),
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
        name="cpu-int8",
        summary="ONNX in 8 bits for CPUs: static int8 for encoders, a scale per 32 inputs for language models",
        reason="What measured best: static int8 takes half of float32's time and keeps an encoder's embeddings; a language "
        "model needs scales per block, is then nearly lossless, and faster at one token after the other.",
        spec=CompressionSpec(
            steps=(QuantizeOnnx(method="auto"),),
            acceptance=Acceptance(max_perplexity_increase=0.01, min_cosine=0.99),
        ),
    ),
    Recipe(
        name="cpu-int4",
        summary="ONNX with 4-bit weights, a scale and zero point per 32 inputs, for CPUs",
        reason="The smallest of our ONNX files, and quick at one token after the other. Calibrated, so that it stays closer "
        "to the original than rounding alone.",
        spec=CompressionSpec(
            steps=(QuantizeOnnx(bits=4, symmetric=False),),
            acceptance=Acceptance(max_perplexity_increase=0.15, min_cosine=0.95),
        ),
    ),
    Recipe(
        name="onnx-cpu",
        summary="ONNX with dynamic int8, for CPUs",
        reason="The quickest way to serve an encoder on CPUs: onnxruntime, no PyTorch at run time.",
        spec=CompressionSpec(steps=(OptimizeOnnx(),), acceptance=Acceptance(min_cosine=0.95)),
    ),
    Recipe(
        name="image-cpu-int8",
        summary="ONNX of an image classifier for CPUs: every convolution and linear layer in int8, static (QDQ)",
        reason="What onnxruntime runs in integers from end to end, for ResNet, MobileNet, ViT and DeiT. Calibrate on images of the "
        "kind the model will see.",
        spec=CompressionSpec(
            steps=(QuantizeOnnx(method="qdq"),), acceptance=Acceptance(min_top1_agreement=0.95)
        ),
        families=_OF_IMAGES,
    ),
    Recipe(
        name="vit-int8",
        summary="8-bit weights in the blocks of a vision transformer, one scale per output channel",
        reason="A quarter of a float32 model's blocks, and needs no calibration. Loads with transformers.",
        spec=CompressionSpec(
            steps=(QuantizeWeights(bits=8),), acceptance=Acceptance(min_top1_agreement=0.95)
        ),
        families=_OF_IMAGES,
    ),
    Recipe(
        name="vit-int4",
        summary="4-bit weights in the blocks of a vision transformer, groups of 32, calibrated",
        reason="The smallest of these, calibrated so that it stays closer to the original than rounding alone. Loads with transformers.",
        spec=CompressionSpec(
            steps=(QuantizeCalibrated(bits=4, group_size=32),), acceptance=Acceptance(min_top1_agreement=0.9)
        ),
        families=_OF_IMAGES,
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
