"""Export to ONNX, let onnxruntime rewrite the graph, quantize to dynamic int8; keep what measures faster.

Four graphs are written at most: as exported; as onnxruntime rewrites it; in int8 with one activation scale a product;
and, if that changes the outputs too much, in int8 with a scale per block (`export/onnx_int8.py` has the figures of
both). Each is compared with PyTorch on real tokens and timed in turns with all others, under the settings that users of
the file have. The exported graph stays unless another is faster by more than 3 %, in the median over paired rounds.

Left out: a key-value cache, so generation computes the whole sequence for each token; static activation scales; fused
attention (onnxruntime recognises none in these graphs, and its Attention operator measured no faster).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from app.spec.optimize import OptimizeOnnx
from workers.engine.architectures.loading import architecture_of, load_model
from workers.engine.architectures.transposed import use_linear_layers
from workers.engine.checkpoint.reader import Checkpoint
from workers.engine.checkpoint.side_files import copy_side_files
from workers.engine.export.onnx import check_graph, export_graph, input_names, publish_graph, run
from workers.engine.optimize.onnx_contest import Times, contest, make_probe, run_torch, speed_ratio
from workers.engine.optimize.onnx_outcome import describe, layer_outcomes, why_not_int8
from workers.engine.optimize.onnx_variants import Variant, Workshop, make_variants, weights_to_quantize
from workers.engine.technique import StepContext, StepOutcome, implements

_FASTER = 0.97
_NO_TEXT = "the model has no tokenizer: accuracy was judged, and int8 chosen, on random tokens"


@implements(OptimizeOnnx)
def optimize_onnx(spec: OptimizeOnnx, context: StepContext) -> StepOutcome:
    """Write the fastest accurate graph of `context.source` to `context.target`, its tokenizer and config beside it."""
    checkpoint = Checkpoint.open(context.source)
    with TemporaryDirectory(prefix=".onnx-", dir=context.target) as scratch:
        variants, times, prefix, is_text = _variants_and_times(spec, Path(scratch), context)
        kept = _choose(variants, times)
        context.progress(0.95, "writing and checking the files")
        publish_graph(kept.directory, context.target)
    check_graph(context.target, threads=context.threads)
    copy_side_files(context.source, context.target)
    reason = why_not_int8(spec, variants, kept, times)
    layers = layer_outcomes(tuple(checkpoint.tensors.values()), kept, reason, base_prefix=prefix)
    context.progress(1.0, "done")
    outcome = describe(spec, variants, kept, times, layers)
    return outcome if is_text else replace(outcome, warnings=(*outcome.warnings, _NO_TEXT))


def _variants_and_times(
    spec: OptimizeOnnx, scratch: Path, context: StepContext
) -> tuple[list[Variant], Times, str, bool]:
    """Export, write all variants and time them; the model and the sessions are gone from memory afterwards.

    Returned last: the prefix of the names of the model's own tensors, e.g. `bert.`, and whether real text was run.
    """
    context.progress(0.0, "loading the model")
    model = load_model(context.source)
    use_linear_layers(model)
    context.progress(0.05, "exporting to ONNX")
    graph = export_graph(model, architecture_of(context.source))
    context.progress(0.5, "running the original")
    probe = make_probe(model, input_names(model), context)
    shop = Workshop(graph, probe, scratch, context.threads)
    variants = make_variants(spec, shop, weights_to_quantize(spec, graph, context), context)
    runners = {name: partial(run, session, probe.timed) for name, session in shop.sessions.items()}
    times = contest(
        {"torch": partial(run_torch, model, probe.timed), **runners},
        lambda share: context.progress(0.75 + 0.2 * share, "timing PyTorch and the graphs in turns"),
    )
    return variants, times, f"{model.base_model_prefix}.", probe.is_text


def _choose(variants: Sequence[Variant], times: Times) -> Variant:
    """The exported graph, unless another is accurate and faster than the best before it."""
    best = variants[0]
    for variant in variants[1:]:
        if variant.is_accurate and speed_ratio(times[variant.name], times[best.name]) < _FASTER:
            best = variant
    return best
