"""Tensors as llama.cpp wants them: rows of q and k in the order of its rotary embedding, floats as bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from app.spec.gguf_layout import ARCHITECTURES, GgufTensor


def row_order(tensor: GgufTensor, config: Any) -> Tensor:
    """Which row of a matrix in Hugging Face's layout each row of the file is: (rows,), int64.

    llama.cpp's llama rotates neighbouring elements of a head, transformers those half a head apart.
    """
    rows = torch.arange(tensor.shape[0])
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    count = next((count for part, count in heads.items() if part in tensor.name), None)
    if count is None or ARCHITECTURES[config.architectures[0]] != "llama":
        return rows
    return rows.view(count, 2, -1).transpose(1, 2).reshape(-1)


def pack_floats(values: Tensor, tensor: GgufTensor, *, shifted: bool = False) -> Tensor:
    """Bytes of a tensor kept in floating point: (rows, …) -> uint8 (rows, bytes of a row); `shifted` adds one."""
    stored = torch.float16 if tensor.format.name == "F16" else torch.float32
    plain = (values.float() + 1 if shifted else values).to(stored).cpu()
    return plain.reshape(len(values), -1).contiguous().view(torch.uint8)
