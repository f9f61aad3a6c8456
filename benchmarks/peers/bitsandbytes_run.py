"""bitsandbytes: NF4 by itself, with the scale of each block its largest weight; and what it makes of NF4 files of ours.

Needs no calibration. Loaded and written by transformers, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path, help="JSON of model, theirs, ours, tokens, report and threads")
    job = json.loads(parser.parse_args().job.read_text())
    torch.set_num_threads(job["threads"])
    report: dict[str, Any] = {"version": version("bitsandbytes")}
    for target, double in job["theirs"].items():
        began = time.perf_counter()
        quantize(job["model"], target, double=double)
        report[target] = time.perf_counter() - began
    for ours, unpacked in job["ours"].items():
        report[ours] = differences(ours, load_file(unpacked), torch.tensor([job["tokens"]]))
    Path(job["report"]).write_text(json.dumps(report, indent=1))


def quantize(source: str, target: str, *, double: bool) -> None:
    """The linear layers inside the blocks, written as bitsandbytes writes them."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", device_map="cpu", local_files_only=True, quantization_config=config
    ).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(target)


@torch.inference_mode()
def differences(directory: str, unpacked: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, float]:
    """The largest, of weights unpacked by both, and of logits: theirs in bitsandbytes' layers, ours in plain ones."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map="cpu", local_files_only=True
    )
    worst, layers = 0.0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            state.dtype = torch.float32
            theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
            worst = max(worst, float((theirs - unpacked[f"{name}.weight"]).abs().max()))
            layers += 1
    logits = model(tokens).logits
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    tied = {"lm_head.weight": unpacked["model.embed_tokens.weight"]} | unpacked
    plain.load_state_dict({name: tied[name].float() for name in plain.state_dict()})
    difference = float((plain.eval()(tokens).logits - logits).abs().max())
    return {"weights": worst, "layers": layers, "logits": difference, "of_logits": float(logits.abs().max())}


if __name__ == "__main__":
    main()
