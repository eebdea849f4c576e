"""A run directory of several processes: the first writes, and what fails in one fails in all."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dph.train.distributed import World, whole
from dph.train.run_dir import Checkpoint, Run, sync, write_tensors


class SharedRun:
    """What a process sees of the run directory, which lies where all processes see it; as :class:`dph.train.run_dir.Run`.

    Process 0 holds the lock, and writes the metrics, the checkpoints and the model. A checkpoint is that of one
    process, so that any number of them goes on from it: whole tensors, gathered one at a time, beside which every other
    process writes the memories of its own streams.
    """

    def __init__(self, world: World, opened: Callable[[], Run]) -> None:
        """``opened`` opens the directory; process 0 calls it."""
        self.world = world
        self._own: Run | None = None
        with world.together():
            self._own = opened() if world.rank == 0 else None
        told = None if self._own is None else (self._own.directory, self._own.checkpoint)
        self.directory: Path
        self.checkpoint: Checkpoint | None
        self.directory, self.checkpoint = world.gather(told)[0]

    @property
    def step(self) -> int:
        """Of the checkpoint; 0 where the run begins."""
        return self.checkpoint.step if self.checkpoint else 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Process 0 logs: the figures are everybody's."""
        if self._own is not None:
            self._own.log(step, values)

    def save(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """As ``Run.save``, of which shards are made whole; of the part ``data`` everyone has his own."""
        folder = self.directory / ".shares.partial"
        ranks = range(1, self.world.size) if parts["data"] else ()
        shares = [folder / f"data-{rank:05}.safetensors" for rank in ranks]
        gathered = {name: self._gathered(tensors) for name, tensors in parts.items()}
        with self.world.together():
            if shares and self._own is None:
                folder.mkdir(exist_ok=True)
                write_tensors(shares[self.world.rank - 1], parts["data"])
                sync(shares[self.world.rank - 1])
        with self.world.together():
            if self._own is not None:
                self._own.save(step, gathered, state, shares)
                if shares:
                    folder.rmdir()

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, in process 0 alone; one at a time, so that no device has to hold them all."""
        kept = {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if self._own is not None:
                kept[name] = full.cpu()
        return kept

    def save_start(self, tensors: Mapping[str, Tensor]) -> None:
        """As ``Run.save_start``."""
        with self.world.together():
            if self._own is not None:
                self._own.save_start(tensors)

    def load_start(self) -> dict[str, Tensor]:
        """As ``Run.load_start``; process 0 looks for damage."""
        with self.world.together():
            if self._own is not None:
                return self._own.load_start()
        return Checkpoint(0, self.directory / "start").tensors("start")

    def save_model(self, model: Any, tokenizer: Any) -> Path:
        """As ``Run.save_model``."""
        with self.world.together():
            if self._own is not None:
                self._own.save_model(model, tokenizer)
        return self.directory / "model"

    def close(self) -> None:
        """As ``Run.close``."""
        if self._own is not None:
            self._own.close()
