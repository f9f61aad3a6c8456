"""What a training needs before its first step: the student's files, and the teacher or what it says."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.spec.architectures import architecture_in, is_compressible
from app.spec.base import Family
from app.spec.compatibility import blocks_cut
from app.spec.distill import DistillLogits, StudentFromDepthCut, StudentFromModel, StudentFromTeacher
from app.spec.text_training import TextTraining
from workers.engine.architectures.block_removal import number_of_blocks, remove_blocks
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.block_stream import Calibration, compute_dtype
from workers.engine.checkpoint import TORCH_DTYPES, Checkpoint
from workers.engine.checkpoint.layout import weight_files
from workers.engine.distill.attention_maps import AttentionMaps
from workers.engine.distill.blocks import blocks_of, recompute_activations
from workers.engine.distill.cut import least_missed, without
from workers.engine.distill.hidden_states import HiddenStates, evenly_matched, kept_blocks, stands_for
from workers.engine.distill.low_rank import LowRank
from workers.engine.distill.objectives import (
    Classroom,
    Matching,
    head_of,
    objective_for,
    states_of,
    width_of,
)
from workers.engine.distill.on_grid import OnGrid
from workers.engine.distill.relations import Relations
from workers.engine.distill.teacher_cache import Likeliest, TeacherCache, likeliest
from workers.engine.distill.texts import TrainingText, document_text, stream_text
from workers.engine.prune.gap_repair import repaired
from workers.engine.technique import StepContext

PREPARING = 0.1
"""Share of the step's progress."""
_CUTTING = 0.05


def journal_key(spec: TextTraining, context: StepContext) -> str:
    """The same for the same training: what its snapshots were begun for."""
    files = [
        (file.name, (stat := file.stat()).st_size, stat.st_mtime_ns)
        for directory in dict.fromkeys((context.source, context.original, context.student))
        if directory is not None
        for file in weight_files(directory)
    ]
    text = context.training_text.read_bytes() if context.training_text else b""
    digest = hashlib.sha256(text)
    digest.update(f"{spec.model_dump_json()} {files} {context.device} {context.seed}".encode())
    return digest.hexdigest()


def training_text(spec: TextTraining, context: StepContext) -> TrainingText:
    """What a step trains on, in the form that the model is taught from."""
    if context.training_text is None:
        raise ValueError("this step needs training text")
    make = stream_text if context.facts.family is Family.CAUSAL_LM else document_text
    tokenizer = load_tokenizer(context.original)
    return make(spec, context.training_text, tokenizer, context.facts, seed=context.seed)


@contextmanager
def student_directory(
    spec: DistillLogits, context: StepContext, text: TrainingText, journal: Path
) -> Iterator[tuple[Path, list[int]]]:
    """The student before training, and which of the teacher's blocks it does without."""
    if isinstance(spec.student, StudentFromModel):
        if context.student is None:
            raise ValueError("the spec names a student, and none was fetched")
        yield context.student, []
    elif isinstance(spec.student, StudentFromDepthCut):
        choice = journal / "cut.json"
        if not choice.is_file():
            choice.write_text(json.dumps(_blocks_to_cut(spec, spec.student.drop_ratio, context, text)))
        dropped: list[int] = json.loads(choice.read_text())
        replaced = _repaired(spec.student, context, text, dropped, journal / "repaired.safetensors")
        with tempfile.TemporaryDirectory(dir=context.target.parent, prefix="student-") as cut:
            remove_blocks(
                context.original,
                Path(cut),
                dropped,
                replaced=replaced,
                max_shard_bytes=context.max_shard_bytes,
                progress=lambda _, message: context.progress(_CUTTING, message),
            )
            yield Path(cut), dropped
    elif isinstance(spec.student, StudentFromTeacher):
        yield context.original, []
    else:
        yield context.source, []


def _blocks_to_cut(
    spec: DistillLogits, drop_ratio: float, context: StepContext, text: TrainingText
) -> list[int]:
    checkpoint = Checkpoint.open(context.original)
    blocks = number_of_blocks(checkpoint.config)
    first = 1 if architecture_in(checkpoint.config).keeps_first_block else 0
    dtype = training_dtype(context.device)
    teacher = load_model(context.original, dtype=dtype, device=context.device)
    room = Classroom(
        teacher, teacher, spec, text.sample(StudentFromDepthCut.LOOK_TOKENS), context.device, dtype
    )
    whole = objective_for(room, context.facts, context.original)
    # What the teacher says of the text is kept from here on, before blocks are left out.
    whole.held_out_loss(lambda: context.progress(0.0, "what the teacher says"))

    def loss_without(gone: Collection[int]) -> float:
        with without(blocks_of(teacher), gone):
            return whole.held_out_loss(
                lambda: context.progress(0.0, f"without {' '.join(map(str, sorted(gone)))}")
            )

    return least_missed(loss_without, range(first, blocks), blocks_cut(drop_ratio, blocks))


def _repaired(
    student: StudentFromDepthCut, context: StepContext, text: TrainingText, dropped: list[int], kept: Path
) -> dict[str, Tensor]:
    """The layers before the gaps, refitted on training text; `kept` holds them for a process that is killed."""
    checkpoint = Checkpoint.open(context.original)
    if not student.repairs(architecture_in(checkpoint.config)):
        return {}
    if not kept.is_file():
        windows = torch.cat([batch.ids for batch in text.sample(student.REPAIR_TOKENS)])
        stored = next(f.dtype for f in checkpoint.facts() if is_compressible(f.name, f.shape))
        with tempfile.TemporaryDirectory(dir=context.target.parent, prefix="spool-") as spool:
            calibration = Calibration(
                directory=context.original,
                windows=windows,
                spool_directory=Path(spool),
                device=context.device,
                progress=lambda share, message: context.progress(_CUTTING * share, f"repairing, {message}"),
                dtype=compute_dtype(TORCH_DTYPES[stored], context.device),
            )
            unfinished = kept.with_suffix(".unfinished")
            save_file(repaired(calibration, dropped).tensors, unfinished)
            unfinished.rename(kept)
    tensors: dict[str, Tensor] = load_file(kept)
    return tensors


def classroom(
    spec: DistillLogits,
    context: StepContext,
    directory: Path,
    text: TrainingText,
    journal: Path,
) -> Classroom:
    """Load the student from `directory`, and the teacher or what it said of the text, kept in `journal`."""
    dtype = training_dtype(context.device)
    # Only so are there probabilities of attention to compare.
    attention = "eager" if spec.attention_weight > 0 else None
    teacher, cache = (
        load_model(context.original, dtype=dtype, device=context.device, attention=attention),
        None,
    )
    if spec.cached_logits is not None:
        cache = _cached(teacher, spec.cached_logits, spec, context, text, journal)
        teacher = None
    student = load_model(directory, dtype=torch.float32, device=context.device, attention=attention)
    adapters = None if spec.lora_rank is None else LowRank(student, spec.lora_rank)
    grid = _grid(spec, student, Checkpoint.open(directory))
    if spec.gradient_checkpointing:
        recompute_activations(student)
    matches = tuple(_matches(spec, student, teacher))
    return Classroom(
        student, teacher, spec, text.held_out, context.device, dtype, cache, adapters, grid, matches
    )


def _cached(
    teacher: Any, k: int, spec: DistillLogits, context: StepContext, text: TrainingText, journal: Path
) -> TeacherCache:
    vocabulary = head_of(teacher).weight.shape[0]
    tokens = len(text.sequences[0]) - 1
    cache = TeacherCache(journal / "teacher", tokens=tokens, k=k, vocabulary=vocabulary)

    @torch.inference_mode()
    def said() -> Iterator[Likeliest]:
        for batch in text.everything(cache.records):
            states = states_of(teacher, batch.to(context.device))
            yield likeliest(states, k=k, temperature=spec.temperature)

    total = len(text.sequences) + sum(len(batch.ids) for batch in text.held_out)
    cache.write(
        said(),
        lambda done: context.progress(
            _CUTTING + (PREPARING - _CUTTING) * done / total,
            f"what the teacher says of text {done} of {total}",
        ),
    )
    return cache


def _grid(spec: DistillLogits, student: Any, checkpoint: Checkpoint) -> OnGrid | None:
    if spec.for_grid is None:
        return None
    stored = next(f.dtype for f in checkpoint.facts() if is_compressible(f.name, f.shape))
    bits, group_size = spec.for_grid.bits, spec.for_grid.group_size
    return OnGrid(student, bits=bits, group_size=group_size, dtype=TORCH_DTYPES[stored])


def _matches(spec: DistillLogits, student: Any, teacher: Any) -> Iterator[tuple[float, Matching]]:
    if spec.relation_weight > 0:
        yield spec.relation_weight, Relations(student, teacher)
    if spec.hidden_weight == spec.attention_weight == 0:
        return
    kept, blocks = kept_blocks(student, teacher), [len(blocks_of(model)) for model in (student, teacher)]
    if spec.attention_weight > 0:
        taught_by = evenly_matched(*blocks) if kept is None else kept
        yield spec.attention_weight, AttentionMaps(student, teacher, taught_by)
    if spec.hidden_weight > 0:
        matched = evenly_matched(*blocks) if kept is None else stands_for(kept, blocks[1])
        hidden = HiddenStates(student, teacher, (width_of(student), width_of(teacher)), matched)
        yield spec.hidden_weight, hidden.to(student.device)


def training_dtype(device: str) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively; emulated it is slower than fp32."""
    if device == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32  # noqa: SLF001
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
