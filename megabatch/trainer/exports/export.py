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
        """The same later: copies what this rank writes into host memory; collective.

        Returns: what writes it as `save` does, in any thread and with no collective. It raises MegabatchError on this
        rank alone.
        """
        ...
