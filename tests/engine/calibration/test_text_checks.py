from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import facts_of

from app.errors import InvalidRequest
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.step_calibration import calibration_windows
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.technique import StepContext

Tiny = Callable[[str], Path]
CHINESE = "他读了两遍信，折好，一言不发地收了起来。雨停了，整个村子的人都出来看彩虹。" * 30
BASE64 = "QmVmb3JlIHRoZSBzdW4gcm9zZSB0aGUgd29ybGQgd2FzIGRhcms4Zk1xWHpLdlBqTg" * 30


def found(
    directory: Path, text: str, tmp_path: Path, *, tokens: int = 256, length: int = 64
) -> dict[str, str]:
    context = _context(directory, text, tmp_path)
    windows = calibration_windows(context, tokens=tokens, length=length)
    return {flag.code: flag.detail for flag in calibration_flags(context, windows, tokens=tokens)}


def _context(directory: Path, text: str, tmp_path: Path) -> StepContext:
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    return StepContext(
        source=directory,
        target=tmp_path,
        original=directory,
        facts=facts_of(directory),
        calibration_text=file,
    )


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel"])
def test_english_prose_of_enough_tokens_raises_nothing(architecture: str, tiny: Tiny, tmp_path: Path) -> None:
    text = builtin_text("evaluation").read_text(encoding="utf-8")[:20_000]
    assert found(tiny(architecture), text, tmp_path) == {}


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("LlamaForCausalLM", "100.0% are parts of characters"),
        ("BertModel", "100.0% of its tokens are unknown"),
    ],
)
def test_text_of_a_script_the_tokenizer_was_not_made_for_is_told_by_its_tokens(
    architecture: str, words: str, tiny: Tiny, tmp_path: Path
) -> None:
    flags = found(tiny(architecture), CHINESE, tmp_path, tokens=64, length=32)
    assert set(flags) == {"calibration_language"}
    assert words in flags["calibration_language"]


def test_text_that_falls_into_crumbs_is_told_by_its_bytes_per_token(tiny: Tiny, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny("LlamaForCausalLM"), directory)
    english = builtin_text("calibration").read_text(encoding="utf-8")
    load_tokenizer(directory).train_new_from_iterator([english], 2000).save_pretrained(str(directory))
    flags = found(directory, BASE64, tmp_path)
    assert set(flags) == {"calibration_language"}
    assert "0.0% of its tokens are unknown, 0.0% are parts of characters" in flags["calibration_language"]
    assert found(directory, english[-20_000:], tmp_path) == {}


def test_end_of_text_tokens_are_not_unknown_ones(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny("LlamaForCausalLM")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    text = builtin_text("evaluation").read_text(encoding="utf-8")[:20_000]
    context = _context(directory, text, tmp_path)
    windows = calibration_windows(context, tokens=256, length=64)
    windows[:, ::8] = tokenizer.eos_token_id
    assert calibration_flags(context, windows, tokens=256) == ()
    windows[:, ::8] = tokenizer.unk_token_id
    (flag,) = calibration_flags(context, windows, tokens=256)
    assert "12.5% of its tokens are unknown" in flag.detail


def test_fewer_tokens_than_asked_for_are_said_with_both_numbers(tiny: Tiny, tmp_path: Path) -> None:
    text = builtin_text("evaluation").read_text(encoding="utf-8")[:1000]
    flags = found(tiny("LlamaForCausalLM"), text, tmp_path, tokens=4096)
    assert set(flags) == {"calibration_short"}
    assert "windows of 64 tokens" in flags["calibration_short"]
    assert "asked for 4,096" in flags["calibration_short"]


def test_a_handful_of_tokens_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="gives 16 tokens") as raised:
        found(tiny("LlamaForCausalLM"), "The river runs past the old mill.", tmp_path, length=16)
    assert raised.value.code == "text_too_short"
