"""quantize.gguf as the API sees it: which models it is refused to, which formats a mix means, and the catalogue."""

from __future__ import annotations

from collections import Counter

import pytest
from job_support import make_facts

from app.spec.base import Family
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.export import FORMATS
from app.spec.facts import TensorFact
from app.spec.gguf import QuantizeGguf
from app.spec.gguf_layout import ARCHITECTURES, GGUF_FILE, data_bytes, gguf_name, gguf_tensors
from app.spec.prune import PruneDepth
from app.spec.recipes import RECIPES
from app.spec.sizes import Shape, after_step

SMOLLM2_LINEARS = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def smollm2() -> tuple[TensorFact, ...]:
    """The tensors of SmolLM2-135M: 30 blocks, 576 wide, tied embeddings."""
    shapes = {"model.embed_tokens": (49152, 576), "model.norm": (576,)}
    for block in range(30):
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in SMOLLM2_LINEARS.items()}
        shapes |= {f"model.layers.{block}.{n}_layernorm": (576,) for n in ("input", "post_attention")}
    return tuple(TensorFact(name=f"{n}.weight", dtype="BF16", shape=s) for n, s in shapes.items())


def faults_of(architecture: str, family: Family = Family.CAUSAL_LM) -> list[str]:
    tensors = tuple(TensorFact(name=t.name, dtype="BF16", shape=t.shape) for t in smollm2())
    facts = make_facts(family, architecture=architecture, tensors=tensors)
    return [f"{f.pointer}: {f.detail}" for f in check_spec(CompressionSpec(steps=(QuantizeGguf(),)), facts)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_that_can_be_read_back_are_accepted(architecture: str) -> None:
    assert faults_of(architecture) == []


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("BertModel", Family.ENCODER),
        ("GemmaForCausalLM", Family.CAUSAL_LM),
        ("SmolLM3ForCausalLM", Family.CAUSAL_LM),
    ],
)
def test_others_are_refused_at_submit(architecture: str, family: Family) -> None:
    (fault,) = faults_of(architecture, family)
    assert fault.startswith("/steps/0/technique")


def test_a_model_that_is_compressed_already_is_refused() -> None:
    packed = TensorFact(name="model.layers.0.mlp.up_proj.weight", dtype="I32", shape=(1536, 72))
    facts = make_facts(tensors=(*smollm2()[:2], packed))
    (fault,) = check_spec(CompressionSpec(steps=(QuantizeGguf(),)), facts)
    assert "already compressed" in fault.detail


def test_no_step_can_follow() -> None:
    with pytest.raises(ValueError, match="put it last"):
        CompressionSpec(steps=(QuantizeGguf(), PruneDepth()))


# What llama-quantize 0.3.36 makes of the same model, its formats counted.
@pytest.mark.parametrize(
    ("mix", "counts"),
    [
        ("Q4_K_M", {"Q5_0": 166, "Q8_0": 15, "Q4_K": 16, "Q6_K": 14, "F32": 61}),
        ("Q8_0", {"Q8_0": 211, "F32": 61}),
    ],
)
def test_a_mix_has_llama_cpps_formats(mix: str, counts: dict[str, int]) -> None:
    tensors = gguf_tensors(smollm2(), "llama", QuantizeGguf.model_validate({"mix": mix}).mix)
    assert Counter(t.format.name for t in tensors) == counts


def test_planned_bytes_are_those_of_the_tensors_and_a_header() -> None:
    tensors = smollm2()
    facts = make_facts(tensors=tensors, vocab_size=49152)
    planned = after_step(QuantizeGguf(), Shape.of(tensors), facts, {}).weight_bytes
    # The file that was measured has 105,454,048 bytes.
    assert planned == pytest.approx(105_454_048, rel=0.001)
    assert planned > data_bytes(gguf_tensors(tensors, "llama", "Q4_K_M"))


def test_a_tensor_the_architecture_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="rotary_table"):
        gguf_name("model.layers.0.self_attn.rotary_table", "llama")


def test_format_and_recipe_are_in_the_catalogue() -> None:
    assert "llama.cpp" in FORMATS["gguf"].runtimes
    recipe = RECIPES["llama.cpp-q4"]
    assert recipe.families == {Family.CAUSAL_LM}
    assert recipe.spec.output_format == "gguf"
    assert GGUF_FILE == "model.gguf"
