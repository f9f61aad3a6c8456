"""How far a stream of blocks is."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.technique import Progress


@dataclass
class StreamProgress:
    """Progress that never goes back, however often a block's windows are gone through."""

    progress: Progress
    blocks: int
    windows: int
    passes: int
    share: float = 0.0
    message: str = ""

    def windows_done(self, index: int, done: int, *, earlier: int) -> None:
        """Say that `done` windows of a pass over block `index` are through, after `earlier` whole passes."""
        share = (index + (earlier + done / self.windows) / self.passes) / self.blocks
        self.share = max(self.share, share)
        self.message = f"block {index + 1} of {self.blocks}"
        self.again()

    def again(self) -> None:
        """Say the same once more."""
        self.progress(self.share, self.message)
