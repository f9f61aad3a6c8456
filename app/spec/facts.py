"""What the headers of a model say about it: enough to check and plan a job without loading a weight."""

from __future__ import annotations

import math
from typing import Literal

from app.spec.architectures import block_index, is_compressible, is_expert, is_graph_layer, is_image_layer
from app.spec.base import Family, Frozen
from app.spec.preprocessing import Preprocessing

BYTES_PER_ELEMENT = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class TensorFact(Frozen):
    """A tensor's name in Hugging Face's layout, dtype in safetensors' spelling, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements; a scalar has one."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements as stored in safetensors."""
        return self.elements * BYTES_PER_ELEMENT[self.dtype]


class ModelFacts(Frozen):
    """Facts of a model. GGUF tensors appear as they will be after conversion: Hugging Face names and dtypes."""

    format: Literal["safetensors", "gguf", "onnx"]
    architecture: str
    family: Family
    parameters: int
    dtype: str
    """The dtype most weights are stored in, e.g. `BF16`, `F32`, or a GGUF type such as `Q4_1`."""
    weight_bytes: int
    """Bytes of the weight files as uploaded."""
    hidden_size: int
    """Of a convolutional network, what its classifier is given."""
    num_blocks: int
    """0 in a convolutional network."""
    vocab_size: int
    """0 for models of images."""
    max_positions: int
    """Tokens; of a vision transformer, those that an image becomes; 0 in a convolutional network."""
    tied_embeddings: bool = False
    num_labels: int | None = None
    """Size of the classification head; null where there is none."""
    label_names: tuple[str, ...] | None = None
    """What config.json calls the classes, in order; null where it does not, or was not asked when the model was uploaded."""
    problem_type: Literal["multi_label_classification", "regression"] | None = None
    """What config.json says the outputs of a classification head are, where they are no distribution over classes."""
    experts_per_token: int | None = None
    """How many experts of a block each token meets; null where every token meets every weight."""
    attention_heads: int | None = None
    """Query heads of a block, where config.json says so; null for models that were uploaded before it was asked."""
    key_value_heads: int | None = None
    """Key and value heads, where several query heads share them."""
    preprocessing: Preprocessing | None = None
    """What becomes of an image before the model sees it; null for models of text."""
    tensors: tuple[TensorFact, ...]

    def compressible(self) -> tuple[TensorFact, ...]:
        """Weights of the linear layers inside blocks, which pruning and quantization work on; all layers of an image classifier."""
        if self.format == "onnx":
            return tuple(t for t in self.tensors if is_graph_layer(t.shape))
        if self.family is Family.IMAGE_CLASSIFIER:
            return tuple(t for t in self.tensors if is_image_layer(t.name, t.shape))
        return tuple(t for t in self.tensors if is_compressible(t.name, t.shape))

    def active_share(self) -> float:
        """Share of the weights that a token meets: time follows these, memory follows all."""
        experts = [t for t in self.tensors if is_expert(t.name)]
        if self.experts_per_token is None or not experts:
            return 1.0
        resting = 1 - self.experts_per_token / _experts_in_a_block(experts)
        return 1 - resting * sum(t.elements for t in experts) / self.parameters

    def block_bytes(self) -> int:
        """Bytes of the largest block: what streaming a model block by block holds at once."""
        totals: dict[int, int] = {}
        for tensor in self.tensors:
            index = block_index(tensor.name)
            if index is not None:
                totals[index] = totals.get(index, 0) + tensor.nbytes
        return max(totals.values(), default=0)


def _experts_in_a_block(experts: list[TensorFact]) -> int:
    return len({t.name.partition(".experts.")[2].partition(".")[0] for t in experts})
