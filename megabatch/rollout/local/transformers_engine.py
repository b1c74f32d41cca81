"""A rollout engine on transformers: the default, and what other engines are compared with.

It batches requests, keeps keys and values, and draws each request's tokens with random numbers of its own. The rest of
a batch changes logits by rounding only (1e-6 in fp32), so completions repeat bit for bit where the batches do, and
otherwise unless a random number falls between two roundings of the same probability.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket
from megabatch.rollout.engine import Completion, Request, RolloutEngine, Scored
from megabatch.rollout.local.filling import Filling, differing
from megabatch.rollout.local.routing import Recorder
from megabatch.rollout.local.rows import Rows


class TransformersEngine:
    """A model of transformers in this process, on one device."""

    experts: Literal["per_expert", "fused"] = "fused"

    def __init__(
        self,
        config_folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int = 64,
        records_routes: bool = False,
    ) -> None:
        """Builds the model of a folder's config.json; it has no weights before the first update.

        Args: max_rows: requests that are generated together; records_routes: whether completions have the experts of
        their tokens (`Completion.routes`).
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        from megabatch.rollout.local.keeping import share_keys

        config = AutoConfig.from_pretrained(config_folder)
        drawn = [device] if device.type == "cuda" else []
        with (
            torch.device(device),
            torch.random.fork_rng(drawn),
        ):  # what the trainer draws is not the engine's to change
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        share_keys(self._model)
        self._recorder = Recorder(self._model) if records_routes else None
        self._config, self._device, self._max_rows = config, device, max_rows
        self._tensors = _own_tensors(self._model)
        self._filling: Filling | None = None
        self._version: int | None = None
        self._coming = 0
        """The version that is being put."""
        self._aborted: set[str] = set()
        self._asleep = 0
        self._paused = False
        self._work = threading.Lock()
        """Held while something is generated or scored, and while the weights change."""

    @property
    def version(self) -> int | None:
        return self._version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        for request in requests:
            self._check_length(request.key, request.prompt, request.sampling.max_tokens)
        made: dict[int, Completion] = {}
        longest_first = sorted(range(len(requests)), key=lambda index: (-len(requests[index].prompt), index))
        with self._work, torch.no_grad():
            version = self._usable()
            for first in range(0, len(requests), self._max_rows):
                chosen = longest_first[first : first + self._max_rows]
                rows = Rows([requests[index] for index in chosen], self._model, version, self._aborted, self._recorder)
                made |= dict(zip(chosen, rows.completed(), strict=True))
        self._aborted -= {request.key for request in requests}
        return [made[index] for index in range(len(requests))]

    def members(self) -> list[RolloutEngine]:
        return [self]

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, ...]]:
        for number, (prompt, completion) in enumerate(sequences):
            self._check_length(f"sequence {number}", prompt, len(completion))
        with self._work, torch.no_grad():
            self._usable()
            return [self._scored(prompt, completion) for prompt, completion in sequences]

    def _scored(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> tuple[float, ...]:
        ids_1T = torch.tensor([prompt + completion], device=self._device)
        logits_TV = self._model(ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logps_T = logits_TV.log_softmax(-1).gather(1, ids_1T[0, len(prompt) :, None])[:, 0]
        return tuple(logps_T.tolist())

    def begin_update(self, version: int) -> None:
        if self._filling is not None:
            raise RolloutError(f"update {version} began before the one before it ended; call abort_update first")
        self._work.acquire()
        self._version, self._coming = None, version
        self._filling = Filling(self._tensors)

    def put(self, bucket: Bucket) -> None:
        if self._filling is None:
            raise RolloutError("weights came outside an update; call begin_update first")
        self._filling.put(bucket)

    def end_update(self) -> None:
        filling = self._filling
        self.abort_update()
        if filling is None:
            raise RolloutError("an update ended that had not begun; call begin_update first")
        filling.end()
        self._version = self._coming

    def abort_update(self) -> None:
        if self._filling is not None:
            self._filling = None
            self._work.release()

    def differing(self, bucket: Bucket) -> list[str]:
        return differing(self._tensors, bucket)

    def pause(self) -> None:
        self._paused = True
        with self._work:
            """Waits for what is being generated."""

    def resume(self) -> None:
        self._paused = False

    def sleep(self, level: int) -> None:
        """Level 1 moves weights to the host; keys and values are kept only while something is generated."""
        with self._work:
            if level >= 1:
                self._model.to("cpu")
            if level >= 2:
                self._version = None
                for tensor in self._tensors.values():
                    tensor.untyped_storage().resize_(0)
            self._asleep = level

    def wake(self, *, cache: bool = True) -> None:
        with self._work:
            for tensor in self._tensors.values():
                if self._asleep >= 2:
                    tensor.untyped_storage().resize_(tensor.nbytes)
            self._model.to(self._device)
            self._tensors, self._asleep = _own_tensors(self._model), 0

    def abort(self, keys: Collection[str]) -> None:
        """From another thread, while this one generates."""
        self._aborted |= set(keys)

    def health(self) -> None:
        self._usable()

    def close(self) -> None:
        del self._model
        self._tensors = {}

    def _usable(self) -> int:
        """The version of the weights. Raises: RolloutError."""
        if self._asleep:
            raise RolloutError("the engine sleeps; call wake first")
        if self._paused:
            raise RolloutError("the engine is paused; call resume first")
        if self._version is None:
            raise RolloutError("the engine has no weights: none came yet, or an update failed; send all of them again")
        return self._version

    def _check_length(self, name: str, prompt: Sequence[int], more: int) -> None:
        """Raises: RolloutError."""
        if not prompt or min(prompt) < 0 or max(prompt) >= self._config.vocab_size:
            raise RolloutError(
                f"{name}: a prompt needs tokens between 0 and {self._config.vocab_size - 1}, and has {len(prompt)}"
                + (f" from {min(prompt)} to {max(prompt)}" if prompt else "")
            )
        most = getattr(self._config, "max_position_embeddings", None)
        if most is not None and len(prompt) + more > most:
            raise RolloutError(
                f"{name}: {len(prompt)} tokens of a prompt and {more} of a completion are more than the model's "
                f"{most} positions; lower data.max_length or rollout.max_completion_length"
            )


def _own_tensors(model: Any) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, each once: tied ones under their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        found.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(found.values())
