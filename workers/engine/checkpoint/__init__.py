"""Streaming checkpoint I/O: read tensors and row slabs by pread, write shards in place."""

from workers.engine.checkpoint.layout import DTYPE_NAMES, TORCH_DTYPES, TensorEntry
from workers.engine.checkpoint.reader import Checkpoint
from workers.engine.checkpoint.side_files import copy_side_files, write_config
from workers.engine.checkpoint.streaming import Slab, map_slabs, row_slabs
from workers.engine.checkpoint.writer import CheckpointWriter

__all__ = [
    "DTYPE_NAMES",
    "TORCH_DTYPES",
    "Checkpoint",
    "CheckpointWriter",
    "Slab",
    "TensorEntry",
    "copy_side_files",
    "map_slabs",
    "row_slabs",
    "write_config",
]
