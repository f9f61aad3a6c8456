"""Facts of a small model, and a worker's part of a job's life, for tests of the API.

`from job_support import make_facts` works in every test below tests/app: its conftest.py puts it on the path.
"""

from __future__ import annotations

import hashlib
from typing import Any

from app.db import job_claims
from app.db.engine import Database
from app.db.job_claims import Claim
from app.db.tables import Artifact
from app.ids import new_id
from app.spec.base import Family
from app.spec.facts import ModelFacts, TensorFact
from app.spec.preprocessing import parse_preprocessing
from app.storage import get_store

LINEARS = {"self_attn.q_proj": 64, "self_attn.o_proj": 64, "mlp.up_proj": 64, "mlp.down_proj": 128}


def make_facts(family: Family = Family.CAUSAL_LM, **changes: Any) -> ModelFacts:
    """Facts of a Llama (or BERT) of four blocks: hidden 64, intermediate 128, vocabulary 320."""
    rows = {"mlp.up_proj": 128}
    prefix = "model.layers" if family is Family.CAUSAL_LM else "encoder.layer"
    tensors = [TensorFact(name="embed_tokens.weight", dtype="BF16", shape=(320, 64))]
    for block in range(4):
        for name, inputs in LINEARS.items():
            shape = (rows.get(name, 64), inputs)
            tensors.append(TensorFact(name=f"{prefix}.{block}.{name}.weight", dtype="BF16", shape=shape))
    values = {
        "format": "safetensors",
        "architecture": "LlamaForCausalLM" if family is Family.CAUSAL_LM else "BertModel",
        "family": family,
        "parameters": sum(t.elements for t in tensors),
        "dtype": "BF16",
        "weight_bytes": sum(t.nbytes for t in tensors) + 2000,
        "hidden_size": 64,
        "num_blocks": 4,
        "vocab_size": 320,
        "max_positions": 128,
        "tensors": tuple(tensors),
    }
    return ModelFacts(**(values | changes))


def make_image_facts(architecture: str = "ViTForImageClassification", **changes: Any) -> ModelFacts:
    """Facts of a vision transformer of four blocks or a network of two convolutions: images of 32, five classes."""
    is_vit = architecture.startswith(("ViT", "DeiT"))
    shapes: dict[str, tuple[int, ...]] = {
        "classifier.weight": (5, 64),
        "stem.convolution.weight": (64, 3, 8, 8),
    }
    if is_vit:
        for block in range(4):
            for name in ("attention.attention.query", "output.dense"):
                shapes[f"vit.encoder.layer.{block}.{name}.weight"] = (64, 64)
    else:
        shapes["layer.0.convolution.weight"] = (64, 1, 3, 3)
    tensors = tuple(TensorFact(name=name, dtype="F32", shape=shape) for name, shape in shapes.items())
    values = {
        "format": "onnx" if architecture == "ONNX" else "safetensors", "architecture": architecture, "family": Family.IMAGE_CLASSIFIER,
        "parameters": sum(t.elements for t in tensors), "dtype": "F32", "hidden_size": 64,
        "weight_bytes": sum(t.nbytes for t in tensors) + 2000, "num_blocks": 4 if is_vit else 0, "vocab_size": 0,
        "max_positions": 17 if is_vit else 0, "num_labels": 5, "tensors": tensors,
        "preprocessing": parse_preprocessing({"size": 32}, model_type="vit", channels=3),
    }  # fmt: skip
    return ModelFacts(**(values | changes))


def claim(database: Database, job_id: str) -> Claim:
    """Take a job as a worker does."""
    with database.write() as session:
        taken = job_claims.claim_job(session, job_id, owner="test", lease_seconds=60)
    assert taken is not None
    return taken


def finish(
    database: Database, taken: Claim, files: dict[str, tuple[str, bytes]], *, verdict: str = "accepted"
) -> list[str]:
    """End a job well, with files in the real store: path -> (kind, content). Returns the ids of the artifacts."""
    artifacts = []
    for path, (kind, content) in files.items():
        get_store().put_stream([content])
        artifacts.append(
            Artifact(
                id=new_id("art"),
                job_id=taken.job_id,
                kind=kind,
                path=path,
                media_type="text/html" if kind == "report_html" else "application/json",
                sha256=hashlib.sha256(content).hexdigest(),
                bytes=len(content),
            )
        )
    ids = [artifact.id for artifact in artifacts]
    with database.write() as session:
        assert job_claims.succeed(session, taken, verdict=verdict, artifacts=artifacts)
    return ids
