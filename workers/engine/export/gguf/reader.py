"""Read a GGUF file back by other people's code: the check on our own writer.

Values are those of the `gguf` package's dequantizers, the configuration is what transformers' table of keys makes of the
header; neither knows of our encoders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.errors import UnsupportedForModel
from workers.engine.checkpoint.gguf_file import read_gguf
from workers.engine.checkpoint.gguf_source import configuration_of

# What a forward pass depends on, in transformers' words.
_COMPUTED_WITH = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "hidden_activation", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "rope_parameters", "partial_rotary_factor", "sliding_window", "layer_types", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip


def check_configuration(file: Path, config: Any) -> None:
    """Raise UnsupportedForModel when the file's header stands for another model than `config` does."""
    read = read_configuration(file)
    for name in _COMPUTED_WITH:
        wanted, found = (_effective(c, name, config.max_position_embeddings) for c in (config, read))
        if not _same(wanted, found):
            raise UnsupportedForModel(
                f"A GGUF file cannot say this model's {name}: {wanted!r} would be read as {found!r}.",
                code="unsupported_configuration",
                hint="Use quantize.calibrated, whose result keeps the model's own configuration.",
            )


def read_configuration(file: Path) -> Any:
    """The configuration a GGUF file declares, as transformers has it."""
    import transformers

    return transformers.AutoConfig.for_model(**configuration_of(read_gguf(file)))


def _effective(config: Any, name: str, positions: int) -> Any:
    """A setting as far as it has an effect: a window as wide as the context is none."""
    value = getattr(config, name, None)
    if name == "sliding_window" and (
        value is None or value >= positions or getattr(config, "use_sliding_window", True) is False
    ):
        return None
    if name == "head_dim" and value is None:
        return config.hidden_size // config.num_attention_heads
    if name == "layer_types":
        return _windows(config, value, positions)
    if name == "rope_parameters":
        return {k: v for k, v in (value or {}).items() if v is not None}
    return value or None


def _windows(config: Any, kinds: list[str] | None, positions: int) -> list[bool]:
    """Which blocks see a window of the text only."""
    has_window = _effective(config, "sliding_window", positions) is not None
    kinds = kinds or ["full_attention"] * config.num_hidden_layers
    return [has_window and kind == "sliding_attention" for kind in kinds]


def _same(wanted: Any, found: Any) -> bool:
    """Equal, numbers to the precision of the float32 that the header holds."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return wanted.keys() == found.keys() and all(_same(wanted[k], found[k]) for k in wanted)
    if isinstance(wanted, float) or isinstance(found, float):
        return bool(wanted is not None and found is not None and abs(wanted - found) <= 1e-6 * abs(wanted))
    return bool(wanted == found)
