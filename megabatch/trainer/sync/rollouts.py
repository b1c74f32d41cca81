"""The rollout engines of a run, seen from all of its ranks: their weights, and what they generate.

Every rank calls everything here together, and gets the same completions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch.distributed as dist

from megabatch.converters.family import Family
from megabatch.errors import ElsewhereError, MegabatchError, RolloutError
from megabatch.rollout.ahead import Ahead
from megabatch.rollout.bucket import Bucket
from megabatch.rollout.engine import (
    Adapter,
    AdapterEngine,
    Completion,
    LostError,
    Request,
    RolloutEngine,
    UnservedError,
)
from megabatch.rollout.turns.conversations import Conversation, Partner
from megabatch.trainer.data.global_batch import Share
from megabatch.trainer.engine import Engine
from megabatch.trainer.model.lora.layers import TRAINED
from megabatch.trainer.model.lora.lora import Lora
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.sums import Ratio
from megabatch.trainer.sync.dealing import dealt
from megabatch.trainer.sync.exchange import Receivers, shared_buckets
from megabatch.trainer.sync.proof import Agreement, agreement, fixed_sequences, trainers_scores

logger = logging.getLogger(__name__)
T = TypeVar("T")

_RESENDS = 3
"""How often weights are sent again before the run gives up on its servers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """Conversations that were begun before, and what is left in flight."""

    conversations: list[Conversation]
    unfinished: int
    """Others that were begun and are not done."""
    landed: int
    """Others that are done."""


class Rollouts:
    """One engine on every rank or shared by neighbouring ranks, or one on the main rank that stands for servers.

    Conversations that were begun (`begin`) go on beside whatever the ranks do. Updates and `generate` hold them;
    `take` and `go_on` let them go on.
    """

    def __init__(
        self,
        mine: RolloutEngine | None,
        ranks: Ranks,
        family: Family,
        *,
        receivers: Receivers = "all",
        experts: Literal["per_expert", "fused"],
        share: Share,
        tolerance: float,
        positions: int,
        bucket_bytes: int | None = None,
        ahead: Ahead | None = None,
        ranks_of_engine: int = 1,
        adapters: bool = False,
        takes: int | None = None,
    ) -> None:
        """Args: mine: this rank's engine, None where it has none; experts: `RolloutEngine.experts`; share: how this
        run makes rows; tolerance: most that log-probabilities of trainer and engines may differ by after an update;
        positions: tokens of a sequence that engines can score; ahead: of the main rank's engine, for `begin`;
        ranks_of_engine: how many ranks have an engine together and call it together, where every rank has a part of
        one; adapters: whether engines (then `AdapterEngine`s) get the policy's adapter alone, after the weights below
        it once; takes: tokens of a prompt and what follows it, where engines take fewer than the run's settings
        say."""
        self.takes = takes
        self._mine, self._ranks, self._family, self._ahead = mine, ranks, family, ahead
        self._receivers, self._experts, self._share = receivers, experts, share
        self._tolerance, self._bucket_bytes = tolerance, bucket_bytes
        self._positions, self._ranks_of_engine, self._adapters = positions, ranks_of_engine, adapters
        self._last: tuple[Engine, int] | None = None
        """The newest update, for servers that lose it."""

    def update(self, engine: Engine, version: int) -> Mapping[str, Ratio]:
        """Gives the policy to the engines, and proves that they compute what it computes. Then the trainer has made
        room for them (`Engine.leave_device`), until `rest`.

        Servers that are lost meanwhile are left out; the weights are sent again for it.
        Returns: metrics. Raises: RolloutError on every rank, naming the tensors that differ where engines can tell.
        """
        self._last = engine, version
        for _ in range(_RESENDS):
            try:
                return self._updated(engine, version)
            except MegabatchError as e:
                if not all(self._everyones(_is_loss(e))):
                    raise
                logger.warning("%s; sending the weights again", e)
        return self._updated(engine, version)

    def _updated(self, engine: Engine, version: int) -> Mapping[str, Ratio]:
        start = time.monotonic()
        self.hold()
        engine.return_to_device()
        self._ranks.each(lambda: self._wake(cache=False))
        self._send(engine, version)
        sent_s = time.monotonic() - start
        found = self._proof(engine)
        if not found.largest <= self._tolerance:
            raise RolloutError(self._disagreement(engine, version, found))
        return {
            "sync_max_logp_difference": Ratio(found.largest, 1.0),
            "sync_mean_logp_difference": Ratio(found.mean, 1.0),
            "sync_s": Ratio(sent_s, 1.0),
        }

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in their order, on every rank. Each rank passes the same requests.

        Raises: RolloutError on every rank.
        """
        found: dict[str, Completion] = {}

        def served() -> str | None:
            self.hold()
            made, lost = self._generated([request for request in requests if request.key not in found])
            found.update(made)
            return lost

        self._until_served(served)
        return [found[request.key] for request in requests]

    def begin(self, requests: Sequence[Request], partner: Partner | None = None) -> None:
        """Adds to what is generated beside the ranks' work, from `go_on` or `take`; what was begun stays as it is.

        Args: partner: what answers the model, on the main rank; None for completions of a single turn."""
        if self._ahead is not None:
            self._ahead.begin(requests, partner)

    def hold(self) -> None:
        """Interrupts what was begun; what it has is kept."""
        if self._ahead is not None:
            self._ahead.hold()

    def go_on(self) -> None:
        if self._ahead is not None:
            self._ahead.go_on()

    def take(self, requests: Sequence[Request]) -> Taken:
        """Waits for requests that were begun; on every rank, in their order. Raises: RolloutError on every rank."""
        found: list[Taken] = []

        def served() -> str | None:
            taken, lost = self._everyones(self._ranks.each(lambda: self._taken(requests)))[0]
            found.extend([taken] if taken is not None else ())
            return lost

        self._until_served(served)
        return found[0]

    def _taken(self, requests: Sequence[Request]) -> tuple[Taken | None, str | None]:
        if self._ahead is None:
            return None, None
        self._ahead.go_on()
        try:
            conversations = self._ahead.take([request.key for request in requests])
        except UnservedError as e:
            return None, str(e)
        return Taken(conversations=conversations, unfinished=self._ahead.unfinished, landed=self._ahead.landed), None

    def _until_served(self, served: Callable[[], str | None]) -> None:
        """Args: served: what was lost, None for nothing; then weights are sent again, and it is called again."""
        for resent in range(_RESENDS + 1):
            if (lost := served()) is None:
                return
            if resent < _RESENDS and self._last is not None:
                logger.warning("%s; sending the weights again", lost)
                self.update(*self._last)
        raise RolloutError(f"{lost}; the weights were sent again {_RESENDS} times")

    def _generated(self, requests: Sequence[Request]) -> tuple[dict[str, Completion], str | None]:
        """Completions by key, and why some are missing; the same on every rank."""
        if self._receivers == "all":
            engines = self._ranks.place.world_size // self._ranks_of_engine
            shares = dealt([request.prompt for request in requests], engines)
            requests = [requests[index] for index in shares[self._ranks.rank // self._ranks_of_engine]]

        def made() -> tuple[Sequence[Completion], str | None]:
            if self._mine is None or not requests:
                return (), None
            try:
                return self._mine.generate(requests), None
            except UnservedError as e:
                return e.completions, str(e)

        everyones = self._everyones(self._ranks.each(made))
        lost = next((text for _, text in everyones if text is not None), None)
        return {one.key: one for some, _ in everyones for one in some}, lost

    def rest(self, level: int) -> None:
        """Frees memory until the next update (`RolloutEngine.sleep`), if not at level 0; then the trainer takes its
        own again."""
        if level:
            self._ranks.each(lambda: self._mine.sleep(level) if self._mine is not None else None)
        if self._last is not None:
            self._last[0].return_to_device()

    def close(self) -> None:
        self.hold()
        if self._mine is not None:
            self._mine.close()

    def _wake(self, *, cache: bool) -> None:
        if self._mine is not None:
            self._mine.wake(cache=cache)

    def _send(self, engine: Engine, version: int) -> None:
        if not self._adapters:
            self._give(self._buckets(engine), lambda mine: mine.begin_update(version))
            return
        if self._ranks.any(self._ranks.each(self._lacks_base)):
            with engine.model.with_adapter(None):
                self._give(self._buckets(engine), lambda mine: mine.begin_update(version))
        lora = engine.model.tuning.lora
        assert lora is not None, "only runs with LoRA send adapters alone"
        adapter = Adapter(rank=max(target.rank for target in lora.targets), scale=lora.scale)
        self._give(
            self._adapter_buckets(engine, lora),
            lambda mine: cast(AdapterEngine, mine).begin_adapter(version, adapter),
        )

    def _lacks_base(self) -> bool:
        return self._mine is not None and not cast(AdapterEngine, self._mine).has_base

    def _give(self, buckets: Iterator[Bucket], begin: Callable[[RolloutEngine], None]) -> None:
        """An update of this rank's engine, if it has one. Raises: RolloutError on every rank."""
        mine, error = self._mine, None
        try:
            self._ranks.each(lambda: None if mine is None else begin(mine))
            for bucket in buckets:  # all of them, whatever fails: other ranks wait in the exchange
                if mine is not None and error is None:
                    error = _error_of(mine.put, bucket)
            self._ranks.each(lambda: _end(mine, error))
        except MegabatchError:
            if mine is not None:
                mine.abort_update()
            raise

    def _adapter_buckets(self, engine: Engine, lora: Lora) -> Iterator[Bucket]:
        shapes = {name: dims for target in lora.targets for name, dims in target.peft_shapes().items()}
        return shared_buckets(
            engine.model,
            lora.table,
            engine.model.ranks,
            receivers=self._receivers,
            bucket_bytes=self._bucket_bytes,
            adapter=TRAINED,
            shapes=shapes,
        )

    def _buckets(self, engine: Engine) -> Iterator[Bucket]:
        table = self._family.tensors(engine.model.shape, experts=self._experts)
        return shared_buckets(
            engine.model, table, engine.model.ranks, receivers=self._receivers, bucket_bytes=self._bucket_bytes
        )

    def _proof(self, engine: Engine) -> Agreement:
        """The worst agreement of any engine, and the mean over engines."""
        sequences = fixed_sequences(engine.model.shape.vocab_size, positions=self._positions)
        expected = trainers_scores(engine, sequences, self._share)
        engine.leave_device()
        self._ranks.each(lambda: self._wake(cache=True))
        members = [] if self._mine is None else self._mine.members()
        mine = self._ranks.each(lambda: [agreement(expected, one.score(sequences)) for one in members])
        found = [one for some in self._everyones(mine) for one in some]
        return Agreement(max(one.largest for one in found), sum(one.mean for one in found) / len(found))

    def _disagreement(self, engine: Engine, version: int, found: Agreement) -> str:
        names: dict[str, None] = {}
        can_tell = True
        engine.return_to_device()
        for bucket in self._buckets(engine):
            differing = self._mine.differing(bucket) if self._mine is not None else []
            can_tell = can_tell and differing is not None
            names |= dict.fromkeys(differing or ())
        everyones = self._everyones((list(names), can_tell))
        tensors = list(dict.fromkeys(name for some, _ in everyones for name in some))
        if tensors:
            blame = f"{len(tensors)} tensors differ: {', '.join(tensors[:5])}{', …' if len(tensors) > 5 else ''}"
        elif all(told for _, told in everyones):
            blame = "all tensors are equal, so that engine and trainer compute differently"
        else:
            blame = "this engine cannot tell which tensors differ"
        return (
            f"after update {version} the engine's log-probabilities differ from the trainer's by up to "
            f"{found.largest:.3g} (mean {found.mean:.3g}), above rollout.sync_tolerance={self._tolerance:g}; {blame}"
        )

    def _everyones(self, value: T) -> list[T]:
        values: list[Any] = [None] * self._ranks.place.world_size
        dist.all_gather_object(values, value)
        return values


def _is_loss(error: MegabatchError) -> bool:
    """Whether a server was lost, here or on another rank."""
    return isinstance(error.error if isinstance(error, ElsewhereError) else error, LostError)


def _end(engine: RolloutEngine | None, error: MegabatchError | None) -> None:
    """Args: error: of what came before."""
    if error is not None:
        raise error
    if engine is not None:
        engine.end_update()


def _error_of(action: Callable[..., None], *arguments: Any) -> MegabatchError | None:
    try:
        action(*arguments)
    except MegabatchError as e:
        return e
    return None
