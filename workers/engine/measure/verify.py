"""Check an exported directory in a fresh process that knows nothing else: no job succeeds without it.

The target's own loader must find every weight, the outputs must be finite, and the tokenizer must still be the
original's. What is sound but worthless, e.g. text that repeats one word, is said and left to the reader.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from app.errors import JobFailed, VerificationFailed
from app.spec.facts import ModelFacts
from app.spec.report import TextSample
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.text import special_tokens
from workers.engine.images.batches import save_images
from workers.engine.measure.embeddings import cosines
from workers.engine.measure.results import Pair, Prepared, RunnerFacts, Verification
from workers.engine.measure.runner_client import RunnerClient
from workers.engine.measure.windows import kind_of, load_windows, save_windows, tokenizer_of

_PROBE_TOKENS = 64
_PROMPT_TOKENS = 12
_NEW_TOKENS = 24
_ROUND_TRIP_CHARACTERS = 2000
_REPEATED_SHARE = 0.8
# Every vocabulary has these.
_ANY_TOKENS = range(16)

Models = tuple[RunnerClient, RunnerClient]


def verify_export(pair: Pair, models: Models, model: ModelFacts, prepared: Prepared | None) -> Verification:
    """Check the result in `models[1]` against the original in `models[0]`, both alive.

    Raises VerificationFailed when weights were lost or made up, or when outputs are not finite; JobFailed
    (`original_is_broken`) when the original's are not.
    """
    facts, kind = (models[0].ready(), models[1].ready()), kind_of(model)
    check_loading(*facts)
    if kind == "image_classifier":
        cosine = _compare_outputs(pair.work, models, _probe_images(pair, model, prepared))
        return Verification(original=facts[0], result=facts[1], output_cosine=cosine)
    tokenizer = _tokenizer(pair.original, needed=prepared is not None)
    probe = _probe_tokens(tokenizer, prepared)
    probe_file = pair.work / "probe.npz"
    save_windows(probe_file, [np.asarray(probe, dtype=np.int64)])
    cosine = _compare_outputs(pair.work, models, probe_file)
    samples: tuple[TextSample, ...] = ()
    degenerate = None
    if kind == "causal_lm" and tokenizer is not None:
        prompt = probe[: len(special_tokens(tokenizer)[0]) + _PROMPT_TOKENS]
        written = [model.generate(prompt, new_tokens=_NEW_TOKENS) for model in models]
        samples = (_sample(tokenizer, prompt, written),)
        degenerate = _degenerate(tokenizer, *written)
    return Verification(
        original=facts[0],
        result=facts[1],
        tokenizer_changes=() if tokenizer is None else tokenizer_changes(tokenizer, pair.result),
        output_cosine=cosine,
        samples=samples,
        degenerate=degenerate,
    )


def check_loading(original: RunnerFacts, result: RunnerFacts) -> None:
    """Raise VerificationFailed when the loader made up or dropped weights of the result that the original has."""
    before, after = original.loading, result.loading
    problems = {
        "are missing from the files and were made up by the loader": set(after.missing) - set(before.missing),
        "were dropped by the loader": set(after.unexpected) - set(before.unexpected),
        "have another shape than the config says": set(after.mismatched) - set(before.mismatched),
    }
    faults = [f"{_names(names)} {what}" for what, names in problems.items() if names]
    if faults:
        raise VerificationFailed(
            f"Not all weights of the exported model load: {'; '.join(faults)}.",
            hint="This is a defect of the export, not of your model: report it with the job's id.",
        )


def check_finite(model: RunnerClient, windows_file: Path, index: int, target: Path) -> np.ndarray[Any, Any]:
    """Outputs of one of the original's windows. Raises JobFailed (`original_is_broken`) for NaN or infinity."""
    outputs, finite = model.outputs(windows_file, index, target)
    if not finite:
        raise JobFailed(
            f"The original model gives NaN or infinity on window {index} of the evaluation data.",
            code="original_is_broken",
            hint="No compression can mend it: check the upload's sha256, and that the model works where you got it.",
        )
    return outputs


def tokenizer_changes(original: Any, result_directory: Path) -> tuple[str, ...]:
    """How the result's tokenizer differs from the original's, in words; a missing one is a difference."""
    text = builtin_text("evaluation").read_text(encoding="utf-8")[:_ROUND_TRIP_CHARACTERS]
    try:
        result = tokenizer_of(result_directory)
    except JobFailed as error:
        return (error.detail,)
    ids, ids_after = original(text)["input_ids"], result(text)["input_ids"]
    changes = []
    if len(original) != len(result):
        changes.append(f"It has {len(result)} entries, the original's {len(original)}.")
    if ids != ids_after:
        changes.append("It cuts text into other tokens than the original's.")
    elif original.decode(ids) != result.decode(ids):
        changes.append("It turns tokens into another text than the original's.")
    return tuple(changes)


def _tokenizer(directory: Path, *, needed: bool) -> Any:
    """The tokenizer of a model, or None where it has none and no text is to be evaluated."""
    try:
        return tokenizer_of(directory)
    except JobFailed:
        if needed:
            raise
        return None


def _probe_tokens(tokenizer: Any, prepared: Prepared | None) -> list[int]:
    if prepared is not None:
        return [int(token) for token in load_windows(prepared.windows_file)[0][:_PROBE_TOKENS]]
    if tokenizer is None:
        return list(_ANY_TOKENS)
    text = builtin_text("evaluation").read_text(encoding="utf-8")[:_ROUND_TRIP_CHARACTERS]
    return [int(token) for token in tokenizer(text)["input_ids"][:_PROBE_TOKENS]]


def _probe_images(pair: Pair, model: ModelFacts, prepared: Prepared | None) -> Path:
    """The images that are evaluated, or noise where none are."""
    preprocessing = model.preprocessing
    if prepared is not None or preprocessing is None:
        return pair.work / "probe.npy" if prepared is None else prepared.windows_file
    shape = (1, len(preprocessing.mean), *preprocessing.size)
    noise = np.random.default_rng(pair.seed).integers(0, 256, shape, dtype=np.uint8)
    save_images(pair.work / "probe.npy", [noise], shape)
    return pair.work / "probe.npy"


def _compare_outputs(work: Path, models: Models, probe: Path) -> float:
    """Cosine of what both give for the first window, or batch, in a file."""
    original = check_finite(models[0], probe, 0, work / "original.raw")
    result, finite = models[1].outputs(probe, 0, work / "result.raw")
    if not finite:
        raise VerificationFailed(
            "The exported model gives NaN or infinity where the original gives numbers.",
            hint="Use more bits or prune less; if the settings were mild, report it with the job's id.",
        )
    if original.shape != result.shape:
        return 0.0
    return float(cosines(original.reshape(1, -1), result.reshape(1, -1))[0])


def _sample(tokenizer: Any, prompt: list[int], written: list[list[int]]) -> TextSample:
    texts = [tokenizer.decode(prompt + tokens, skip_special_tokens=True) for tokens in written]
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    original, result = (text.removeprefix(start) for text in texts)
    return TextSample(prompt=start, original=original, result=result)


def _degenerate(tokenizer: Any, original: list[int], result: list[int]) -> str | None:
    token, share = _most_repeated(result)
    if share < _REPEATED_SHARE or _most_repeated(original)[1] >= _REPEATED_SHARE:
        return None
    word = tokenizer.decode([token])
    return f"Left to write by itself it repeats one token, {word!r}, for {share:.0%} of its text; the original does not."


def _most_repeated(tokens: list[int]) -> tuple[int, float]:
    """The commonest token and its share; a text of a few tokens repeats nothing."""
    if len(tokens) < 8:
        return 0, 0.0
    token, count = Counter(tokens).most_common(1)[0]
    return token, count / len(tokens)


def _names(names: set[str], shown: int = 5) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more
