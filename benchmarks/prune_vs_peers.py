"""Prune half of the weights of language models by Modelpress and by its peers, on the same text: quality, time, memory.

Usage: .venv/bin/python benchmarks/prune_vs_peers.py --model DIRECTORY [--model DIRECTORY ...]
           [--calibration-text FILE] [--evaluation-text FILE] [--case sparse50 ...] [--peer NAME ...] [--ours FILE]
           [--reuse-peers]

All linear layers inside blocks, head and embeddings left as they are, without any pattern and 2:4; calibrated on the same
64 x 512 tokens (128 x 256 for a model that takes no more). Everything else is as quantize_vs_peers.py says; our settings
stand in our_pruning.json.
"""

from __future__ import annotations

from pathlib import Path

from peers.catalogue import PRUNING
from quantize_vs_peers import run

OUR_SETTINGS = Path(__file__).parent / "our_pruning.json"

if __name__ == "__main__":
    run(__doc__ or "", PRUNING, OUR_SETTINGS, figures="prune_vs_peers")
