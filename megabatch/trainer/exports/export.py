"""What a checkpoint holds for others to load, besides the state that the run resumes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megabatch.saved.manifest import File
from megabatch.trainer.model.build import Model
from megabatch.trainer.ranks import Ranks


class Export(Protocol):
    """Writes the live model in the form in which it is used: a Hugging Face folder, an adapter, a classifier."""

    def save(self, model: Model, ranks: Ranks, directory: Path) -> dict[str, File]:
        """Writes into an existing empty directory; collective.

        Returns: the files that this rank wrote, by their path in the directory, with digests taken on the way.
        Raises: MegabatchError on every rank if one failed, without a hang.
        """
        ...

    def copied(self, model: Model, ranks: Ranks) -> Callable[[Path], dict[str, File]]:
        """The same for a later write: copies what this rank writes into host memory; collective.

        Returns: a function that writes like `save`, in any thread and without collectives. It raises MegabatchError
        only on this rank.
        """
        ...
