"""What a rollout engine is: it samples completions of prompts, scores given tokens, and takes new weights.

Token ids go in and come out; text is the caller's. Engines know nothing of the trainer's model: weights reach them as
Hugging Face tensors in buckets (`rollout.bucket`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket

if TYPE_CHECKING:
    import numpy as np

Finish = Literal["stop", "length", "aborted"]
"""Why a completion ended: at one of `Sampling.stop_ids`, at `Sampling.max_tokens`, or by `RolloutEngine.abort`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn, in the order of transformers and vLLM: repetition penalty, temperature, top-k, top-p."""

    temperature: float
    """Above 0."""
    top_p: float = 1.0
    """Draws from the fewest most likely tokens whose probabilities add up to this; 1 draws from all."""
    top_k: int = -1
    """Draws from that many most likely tokens; -1 draws from all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the prompt or the completion has already."""
    max_tokens: int
    """Most tokens of a completion, the stop token included."""
    stop_ids: tuple[int, ...]
    """Tokens that end a completion; the one that did is its last token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion of one prompt."""

    key: str
    """Unique in a run, for example step/prompt/number: a completion that comes twice is recognised by it."""
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    """Decides every draw of this completion, whatever else is in the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What was sampled for one request. `ids`, `logps` and `versions` are of equal length."""

    key: str
    ids: tuple[int, ...]
    """The tokens, with the stop token if one ended it."""
    logps: tuple[float, ...]
    """Natural log-probability of each token under the distribution that it was drawn from, with `Sampling` applied."""
    versions: tuple[int, ...]
    """Version of the policy that drew each token."""
    finish: Finish
    routes: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[tokens of prompt and completion, layers, K] uint8 or int16: the experts that each token went to, from engines
    that record them; 0 in layers without experts. The last token, which nothing was drawn behind, has any."""


Scored = tuple[tuple[int, ...], tuple[int, ...]]
"""(prompt, completion) for `RolloutEngine.score`."""


class LostError(RolloutError):
    """A server was lost, or has other weights; an update reaches those that are left, and it once it is back."""


class UnservedError(LostError):
    """Servers were lost before all requests were served; those that are left need the weights again."""

    def __init__(self, message: str, completions: Sequence[Completion]) -> None:
        super().__init__(message)
        self.completions = tuple(completions)
        """What was generated with the right weights."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.completions)  # pickle would pass the text alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What an adapter is besides its matrices, which travel by their names in PEFT's folder."""

    rank: int
    scale: float
    """What B A x is multiplied by."""


class RolloutEngine(Protocol):
    """Samples with the weights that it was last given.

    An update is `begin_update`, any number of `put`, `end_update`; after `abort_update`, or when one of them failed,
    the engine has no weights that may be used and the next update sends all of them again. Raises everywhere:
    RolloutError.
    """

    experts: Literal["per_expert", "fused"]
    """Which of a family's names the engine takes for experts' tensors (`converters.family.Family.tensors`)."""

    @property
    def version(self) -> int | None:
        """Version of the weights; None before the first update and after one that failed."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in the order of the requests. The tokens of a request follow from its
        prompt, sampling, seed and the weights alone. Raises: UnservedError where servers may be lost."""
        ...

    def members(self) -> Sequence[RolloutEngine]:
        """The engines that this one stands for, each with weights of its own; itself if it is one."""
        ...

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, ...]]:
        """Natural log-probabilities at temperature 1 of each sequence's completion tokens, one forward pass each."""
        ...

    def begin_update(self, version: int) -> None:
        """Starts to take the weights of a version of the policy."""
        ...

    def put(self, bucket: Bucket) -> None:
        """Takes tensors, or parts of large ones, in any order; the data may be reused afterwards."""
        ...

    def end_update(self) -> None:
        """Uses the new weights, and forgets what was cached of the old ones.

        Raises: RolloutError naming tensors of the model that did not come.
        """
        ...

    def abort_update(self) -> None:
        """Gives up an update that cannot be completed."""
        ...

    def differing(self, bucket: Bucket) -> list[str] | None:
        """Names of the tensors of which the bucket has other bytes than the engine; None if it cannot tell."""
        ...

    def pause(self) -> None:
        """Takes no new work until `resume`; what is being generated is finished first."""
        ...

    def resume(self) -> None: ...

    def sleep(self, level: int) -> None:
        """Frees memory while the engine is not used. Level 1 frees the cache and moves weights to the host, level 2
        drops weights too, so that an update must follow `wake`; level 0 does nothing."""
        ...

    def wake(self, *, cache: bool = True) -> None:
        """Args: cache: False for an update of the weights, before `wake` with True: what is not needed for that may
        still sleep."""
        ...

    def abort(self, keys: Collection[str]) -> None:
        """Ends these requests; they come back with what they have, as `aborted`."""
        ...

    def health(self) -> None:
        """Raises: RolloutError if the engine cannot be used, saying why."""
        ...

    def close(self) -> None: ...


class AdapterEngine(RolloutEngine, Protocol):
    """An engine that also takes an adapter alone, on weights that it keeps."""

    @property
    def has_base(self) -> bool:
        """Whether it has the weights below the adapter, from an update."""
        ...

    def begin_adapter(self, version: int, adapter: Adapter) -> None:
        """Starts to take an adapter in place of the one before, as an update: `put`, then `end_update`."""
        ...
