"""Binds a spec class to the code that executes it, and says what that code is given and must give back."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from app.spec.base import Step
from app.spec.facts import ModelFacts
from app.spec.report import Flag, LayerOutcome

Progress = Callable[[float, str], None]


def _no_progress(fraction: float, message: str) -> None:
    """Discard progress: for callers that do not show it."""


def never() -> bool:
    """Nobody asks for training to end early."""
    return False


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a technique is given. Directories are in Hugging Face layout: config.json, safetensors, tokenizer."""

    source: Path
    """The model as the step before left it. Read only."""
    target: Path
    """An empty directory to write the new model into, complete with config and tokenizer."""
    original: Path
    """The model as it came in (converted to safetensors if it was GGUF): the teacher. Read only."""
    facts: ModelFacts
    """Facts of the model in `original`."""
    student: Path | None = None
    """An uploaded student, if the spec names one."""
    calibration_text: Path | None = None
    """UTF-8 text; documents are separated by blank lines. Set when the step needs calibration."""
    calibration_images: Path | None = None
    """A set of images (see engine.images.image_set), in place of the text, for models that take them."""
    training_text: Path | None = None
    """The same, when the step trains."""
    training_images: Path | None = None
    """A set of images in place of the training text, for models that take them."""
    device: str = "cpu"
    more_devices: tuple[str, ...] = ()
    """Others that share the calibration with it; everything else is done on the first."""
    threads: int = 1
    journal: Path | None = None
    """A directory that outlives this process, for a step that was killed to go on where it was; it may hold what an
    earlier try left. The step removes it when it is done."""
    memory_budget: int | None = None
    """Bytes this process may use; None for no limit."""
    max_shard_bytes: int = 5_000_000_000
    seed: int = 0
    stop_training: Callable[[], bool] = never
    """Whether somebody has asked for training to end at its best state so far."""
    progress: Progress = _no_progress
    """Call with a fraction from 0 to 1 and a few words, at least every few seconds of work. May raise to stop."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a technique gives back beside the files in `target`."""

    layers: tuple[LayerOutcome, ...] = ()
    """Every compressible layer of `source`, each once."""
    metrics: dict[str, float | int | str | None] = field(default_factory=dict)
    curves: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    """Warnings with a name: of what is known to be wrong with the model or the text."""


S = TypeVar("S", bound=Step)
Runner = Callable[[S, StepContext], StepOutcome]
_RUNNERS: dict[type[Step], Callable[[Step, StepContext], StepOutcome]] = {}


def implements(spec_class: type[S]) -> Callable[[Runner[S]], Runner[S]]:
    """Bind the decorated function to a spec class; `run_step` finds it by the class of the step."""

    def bind(run: Runner[S]) -> Runner[S]:
        if spec_class in _RUNNERS:
            raise ValueError(f"{spec_class.__name__} is implemented twice")
        _RUNNERS[spec_class] = run  # type: ignore[assignment]
        return run

    return bind


def implemented() -> frozenset[type[Step]]:
    """The spec classes that have code, once every technique's module is imported."""
    _import_techniques()
    return frozenset(_RUNNERS)


def run_step(step: Step, context: StepContext) -> StepOutcome:
    """Execute one step of a spec."""
    if type(step) not in _RUNNERS:
        # A technique's name is its module's: a job imports what it runs, and nothing else.
        importlib.import_module(f"workers.engine.{type(step).model_fields['technique'].default}")
    return _RUNNERS[type(step)](step, context)


def _import_techniques() -> None:
    """Import every module of the technique families, so that their decorators run."""
    for family in ("prune", "distill", "quantize", "optimize"):
        package = importlib.import_module(f"workers.engine.{family}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
