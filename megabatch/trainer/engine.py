"""Optimizer steps and evaluation through megatron-core's pipeline schedules, under one rule for every loss.

The objective returns numerators. The engine divides by the denominator of the global batch, which the source of steps
knows without communication, and undoes megatron-core's own scaling: the schedule multiplies every loss of a
micro-batch, the MoE balancing losses included, by cp / num_microbatches, and data parallelism averages gradients over
dp * cp ranks. That average also counts empty micro-batches, which only fill up a pipeline round; `empty_undone`
corrects for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megabatch.errors import DataError
from megabatch.trainer import megatron_moe, routes
from megabatch.trainer.model.build import Model
from megabatch.trainer.model.lora.gradients import finalize
from megabatch.trainer.model.naming import unwrap
from megabatch.trainer.model.output_rows import can_leave_out_rows, rows_of_output
from megabatch.trainer.model.row import row
from megabatch.trainer.objectives.objective import Mean, Norm, Objective, Terms
from megabatch.trainer.ops.parts import summed
from megabatch.trainer.ops.vocab import VocabShard
from megabatch.trainer.optimizer import Optimizer
from megabatch.trainer.other_layout import OtherLayout
from megabatch.trainer.pack import Pack
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.readouts.broadcast import on_all_ranks
from megabatch.trainer.readouts.readout import Readout, Split
from megabatch.trainer.references import Following, blend, copy_adapter
from megabatch.trainer.stopwatch import Stopwatch
from megabatch.trainer.stowage import Stowage
from megabatch.trainer.sums import NONE, Flags, Measured, Ratio, Sums
from megabatch.trainer.zigzag import Cut, on_device, zigzag

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    metrics: Mapping[str, Ratio]
    grad_norm: float | None
    """L2 norm of the gradient of the global batch's loss, before clipping. None when fp16 gradients overflowed, and
    the step changed no parameter."""
    updated: bool
    """False when a guard or an overflow skipped the update."""
    learning_rate: float
    loss_scale: Mapping[str, float] | None
    """State of the fp16 loss scale after the step (`LossScale.state`)."""
    flags: Flags
    """Flags raised by any rank; the same on every rank."""
    read: Sequence[Mapping[str, Tensor]]
    """What the objective read of each pack, as `Engine.infer` gives it, where it was asked for."""
    times: Mapping[str, float]
    """Seconds by part of the step. On a GPU the last part is the previous step's, so reading it blocks nothing."""


POLICY = "policy"
"""Name of the trained model in `Engine.infer`."""

Accept = Callable[[Measured], bool]
"""Decides whether to apply a step's update; must answer the same on every rank."""

Last = Callable[[Pack, Tensor], tuple[Tensor, Mapping[str, Any]]]
"""Processes a micro-batch's output on the last pipeline stage: returns (loss, what the schedule hands back)."""


class Engine:
    """A model, its optimizer and the ranks that share it."""

    def __init__(
        self,
        model: Model,
        ranks: Ranks,
        *,
        optimizer: Optimizer | None = None,
        frozen: Mapping[str, Model] | None = None,
        adapters: Mapping[str, str | None] | None = None,
        following: Mapping[str, Following] | None = None,
        stowage: Stowage | None = None,
    ) -> None:
        """Args: `frozen`: more models by name, such as a reference, without gradients; adapters: which of its adapters
        each of these uses, if not the one that it always has; following: which of them follow the policy; stowage:
        what leaves the device while engines generate.

        Models may be split otherwise than `ranks` (`Model.ranks`), but not one that is trained or followed.
        """
        self.model = model
        self.ranks = ranks
        self.optimizer = optimizer
        self.models = {POLICY: model, **(frozen or {})}
        self._adapters = adapters or {}
        self.following = following or {}
        self._stowage = stowage
        self._splits = {name: _split(one) for name, one in self.models.items()}
        self._others = {
            name: OtherLayout(ranks, one.ranks) for name, one in self.models.items() if one.ranks is not ranks
        }
        self._stopwatch = Stopwatch(ranks.device)
        model.config.finalize_model_grads_func = finalize
        if optimizer is not None:
            _overlap(model)

    def step(
        self,
        packs: Sequence[Pack],
        objective: Objective,
        *,
        totals: Mapping[Norm, float],
        filled: int,
        flags: Flags = NONE,
        accept: Accept = lambda measured: True,
        reads: bool = False,
    ) -> StepResult:
        """One optimizer step on this data-parallel rank's micro-batches.

        Args: packs: this rank's micro-batches; totals: denominators of the global batch, over all data-parallel ranks;
        filled: micro-batches that hold samples, over all data-parallel ranks; flags: this rank's flags after this
        step; accept: called before the update; reads: whether the result has what the objective read of each pack.
        """
        assert self.optimizer is not None, "an engine for inference has no optimizer"
        packs = objective.prepare(packs, self)
        for chunk in self.model.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        undone = empty_undone(micro_batches=len(packs), dp_size=self.ranks.dp_size, filled=filled)
        self.model.config.grad_scale_func = partial(_scaled, self.optimizer, undone)
        factor = _factor(objective.norm, totals, filled=filled)
        sums = Sums(objective.metrics, self.ranks)
        self._stopwatch.start()
        kept: list[Mapping[str, Tensor]] | None = [] if reads else None
        weighted = objective.readout.weighted_only
        last = self._loss(objective, factor, kept)
        sums.add(found := self._run(POLICY, packs, last, forward_only=False, weighted_only=weighted))
        # the sums travel while the optimizer waits for the gradient norm, so reading them afterwards is free
        pending = sums.reduce(flags)
        grad_norm = self.optimizer.gradient_norm()
        self._stopwatch.end("forward_backward_s")
        metrics, raised = pending.read()
        accepted = accept(Measured(metrics, grad_norm, found if sums.adds else []))
        if updated := accepted and grad_norm is not None:
            self.optimizer.update(grad_norm)
        self._stopwatch.end("optimizer_s")
        scale = self.optimizer.loss_scale
        return StepResult(
            metrics=metrics,
            grad_norm=grad_norm,
            updated=updated,
            learning_rate=self.optimizer.learning_rate,
            loss_scale=None if scale is None else scale.state(),
            flags=raised,
            read=() if kept is None else self._whole(POLICY, kept, packs, objective.readout),
            times=self._stopwatch.read(),
        )

    def follow(self, steps: int) -> None:
        """Blends the policy into the frozen models that follow it and are due after so many steps of the run."""
        for name, following in self.following.items():
            if not following.is_due(steps):
                continue
            if self.models[name] is self.model:
                copy_adapter(self.model, name)
            else:
                blend(self.models[name], self.model, following.alpha)
            logger.info("after step %d, %s takes %g of the policy", steps, name, following.alpha)

    def leave_device(self) -> None:
        """Makes room for engines that generate, where the run says so: until `return_to_device`, nothing may use the
        model or the optimizer. Collective, as `Model.chunks`."""
        if self._stowage is not None:
            self._stowage.leave()

    def return_to_device(self) -> None:
        """Does nothing where they are there."""
        if self._stowage is not None:
            self._stowage.come_back()

    def optimizer_from_model(self) -> None:
        """Copies the model's weights into the optimizer's main parameters, after loading weights."""
        if self.optimizer is not None:
            self.optimizer.take_values()

    def evaluate(self, batches: Iterable[Sequence[Pack]], objective: Objective) -> Mapping[str, Ratio]:
        """The objective's metrics over these batches of micro-batches on all data-parallel ranks; no gradients."""
        sums, weighted = Sums(objective.metrics, self.ranks), objective.readout.weighted_only
        for packs in batches:
            prepared, last = objective.prepare(packs, self), self._loss(objective, 1.0)
            sums.add(self._without_gradients(POLICY, prepared, last, weighted_only=weighted))
        return sums.reduce().read()[0]

    def infer(
        self, packs: Sequence[Pack], readout: Readout, *, model: str = POLICY, records_routes: bool = False
    ) -> list[dict[str, Tensor]]:
        """The readout's fields of each pack, on every rank that shares the model; no gradients, no dropout.

        With `records_routes` also the field `routes.ROUTES`: the experts of each token, [T, L, K] int64.

        All packs go through the pipeline in one pass, interleaved or not. One collective joins the parts of rows split
        by context parallelism; another sends the fields to the other stages. Collective over the ranks that share a
        model, rows (context parallel) or experts: each passes the same number of packs, one that an interleaved
        pipeline accepts (`Interleaving.rounds`).

        Returns: tensors on this rank's device, in the order of the packs: `[T]` or `[N]` by `Field.per`, then the
        dimensions of `Field.shape`.
        Raises: DataError for a token that the model does not have.
        """
        self._require_rows(model, packs)
        if (other := self._others.get(model)) is not None:
            there, dealt = other.there(packs)
            return other.back(self._read(model, there, readout), dealt, packs, readout.fields)
        return self._read(model, packs, readout, records_routes=records_routes)

    def _require_rows(self, name: str, packs: Sequence[Pack]) -> None:
        """A policy with more tokens may write one that a frozen model lacks, whose ranks would read it as nothing."""
        rows = self.models[name].shape.vocab_size
        if rows >= self.model.shape.vocab_size:
            return
        largest = max((int(pack.ids_T.max()) for pack in packs if len(pack.ids_T)), default=0)
        if largest >= rows:
            raise DataError(
                f"the {name} has {rows:,} tokens and cannot read a text with the token of id {largest:,}, which the "
                f"trained model, of {self.model.shape.vocab_size:,}, has; give it as many rows with transformers' "
                "resize_token_embeddings"
            )

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that hold other samples of the global batch; collective over them."""
        values = values.to(self.ranks.device, copy=True)
        if self.ranks.dp_size > 1:
            dist.all_reduce(values, group=self.ranks.dp)
        return values

    def everyone(self, values: Tensor, *, parts: bool = False) -> tuple[Tensor, int]:
        """The rows of a tensor [n, …] of every rank that holds other samples of the global batch, in the order of the
        ranks, each with an n of its own; and the place of this rank's first row. Collective over them.

        Args: parts: also of the ranks that hold other parts of the same samples.
        """
        group, values = self.ranks.replicas if parts else self.ranks.dp, values.to(self.ranks.device)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        if size == 1:
            return values, 0
        counts = torch.zeros(size, dtype=torch.int64, device=values.device)
        counts[rank] = len(values)
        dist.all_reduce(counts, group=group)
        lengths = counts.tolist()
        padded = values.new_zeros((max(lengths), *values.shape[1:]))
        padded[: len(values)] = values
        found = values.new_empty((size, *padded.shape))
        dist.all_gather_into_tensor(found.view(-1), padded.view(-1), group=group)
        joined = torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])
        return joined, sum(lengths[:rank])

    def _read(
        self, model: str, packs: Sequence[Pack], readout: Readout, *, records_routes: bool = False
    ) -> list[dict[str, Tensor]]:
        """`infer`, of packs of the model's own layout."""

        def read(pack: Pack, output: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            return output.new_zeros(()), readout(output, pack, self._splits[model])

        ranks = self.models[model].ranks
        table = routes.empty(packs, self.models[model], ranks.device) if records_routes else None
        found = self._without_gradients(model, packs, read, table, weighted_only=readout.weighted_only)
        fields = self._whole(model, found, packs, readout)
        if table is None:
            return fields
        experts = routes.recorded(table, packs, ranks)
        return [{**one, routes.ROUTES: some} for one, some in zip(fields, experts, strict=True)]

    def _whole(
        self, model: str, found: Sequence[Mapping[str, Tensor]], packs: Sequence[Pack], readout: Readout
    ) -> list[dict[str, Tensor]]:
        """The fields of whole packs, on every rank that shares the model. Args: found: of this rank's parts."""
        ranks = self.models[model].ranks
        cuts = [_cut(pack, ranks) for pack in packs]
        return on_all_ranks(found, packs, readout.fields, ranks, cuts=cuts)

    def _without_gradients(
        self,
        model: str,
        packs: Sequence[Pack],
        last: Last,
        table: routes.Table | None = None,
        *,
        weighted_only: bool,
    ) -> list[Mapping[str, Any]]:
        for chunk in self.models[model].wrapped:
            chunk.eval()
        with torch.no_grad(), self.models[model].on_device(), self._adapter(model):
            return self._run(model, packs, last, forward_only=True, weighted_only=weighted_only, table=table)

    def _adapter(self, model: str) -> AbstractContextManager[None]:
        """Puts the adapter of a model in use."""
        if model not in self._adapters:
            return nullcontext()
        return self.models[model].with_adapter(self._adapters[model])

    def _loss(self, objective: Objective, factor: float, kept: list[Mapping[str, Tensor]] | None = None) -> Last:
        """Args: `factor`: multiplies the numerators; `kept`: where what was read of each pack is left."""

        def loss(pack: Pack, output: Tensor) -> tuple[Tensor, Mapping[str, Mean]]:
            out = objective.readout(output, pack, self._splits[POLICY])
            if kept is not None:
                kept.append({name: value.detach() for name, value in out.items()})
            terms = share_of(objective.terms(out, pack), pack)
            scale: Tensor | float = factor
            if objective.norm is Norm.MICRO_BATCH:
                weight = terms.weight if pack.cut is None else summed(terms.weight, pack.cut.group)
                scale = 1.0 / weight.clamp(min=1e-20)
            return terms.numerator * scale, terms.metrics

        return loss

    def _run(
        self,
        name: str,
        packs: Sequence[Pack],
        last: Last,
        *,
        forward_only: bool,
        weighted_only: bool,
        table: routes.Table | None = None,
    ) -> list[Mapping[str, Any]]:
        """What `last` returned for each micro-batch; empty on the other stages.

        Args: `weighted_only`: as a readout's; `table`: where routes are recorded; without it, the policy takes those
        that the packs bring.
        """
        model = self.models[name]
        if table is None and model is self.model:
            table = routes.given(packs, self.ranks.device)
        if table is not None:
            packs = routes.placed(packs)
        longest = max(len(pack.ids_T) for pack in packs)
        iterators: list[Iterator[Pack]] = [iter(packs) for _ in model.wrapped]
        with model.ranks.in_use(), nullcontext() if table is None else routes.routed(model, table):
            return get_forward_backward_func()(
                forward_step_func=partial(self._forward, model=model, last=last, weighted_only=weighted_only),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=model.wrapped if len(iterators) > 1 else model.wrapped[0],
                num_microbatches=len(packs),
                seq_length=longest,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _forward(
        self, packs: Iterator[Pack], chunk: Any, *, model: Model, last: Last, weighted_only: bool
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Mapping[str, Any]]]]:
        on_host = next(packs)
        pack, cut = on_host.to(self.ranks.device), _cut(on_host, model.ranks)
        if cut is not None:
            pack = pack.part(cut)
        if weighted_only and can_leave_out_rows(model.config, chunk):
            pack = replace(pack, read_t=on_device(on_host.weighted(cut), self.ranks.device))
        with rows_of_output(chunk, pack.read_t):
            output = chunk(
                input_ids=pack.ids_T[None],
                position_ids=pack.positions_T[None],
                attention_mask=None,
                packed_seq_params=self._sequences(model, on_host, pack),
                **self._padding(model, pack, chunk),
            )
        return output, lambda output: last(pack, output.squeeze(0))

    def _padding(self, model: Model, pack: Pack, chunk: Any) -> dict[str, Tensor]:
        """The mask of positions that experts skip: the row's, or on a stage without the embedding this rank's part.

        For sequence parallelism, megatron-core splits the mask where it splits the embedding's output. Experts with a
        capacity also need the original order of a row that is split over context-parallel ranks; those whose routes
        are recorded or replayed, each token's place among them.
        """
        mask_T = pack.padding_T
        if (places_T := pack.token_columns.get(routes.PLACES)) is not None:
            mask_T = megatron_moe.places(places_T, mask_T)
        if pack.cut is not None and model.config.moe_expert_capacity_factor is not None:
            mask_T = megatron_moe.places(pack.cut.mine_t, mask_T)
        if mask_T is None or model.config.num_moe_experts is None:
            return {}
        if model.config.sequence_parallel and not unwrap(chunk).pre_process:
            mask_T = mask_T.chunk(model.ranks.tp_size)[model.ranks.tp_rank]
        return {"padding_mask": mask_T[None]}

    def _sequences(self, model: Model, on_host: Pack, pack: Pack) -> PackedSeqParams:
        """Where each sequence of a row starts and ends, for the layers."""
        if model.rotary is not None:
            rotation = model.rotary(pack.positions_T)
            return row(
                on_host.cu_seqlens_padded,
                device=self.ranks.device,
                rotation=rotation,
                cut=pack.cut,
                shared=on_host.shared,
            )
        assert pack.shared_N is None, "only our attention knows shared tokens"
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=pack.cu_seqlens_padded,
            cu_seqlens_kv=pack.cu_seqlens_padded,
            cu_seqlens_q_padded=pack.cu_seqlens_padded,
            cu_seqlens_kv_padded=pack.cu_seqlens_padded,
            max_seqlen_q=pack.max_seqlen,
            max_seqlen_kv=pack.max_seqlen,
        )


def _cut(pack: Pack, ranks: Ranks) -> Cut | None:
    """How a row is split over context-parallel ranks."""
    if ranks.cp_size == 1:
        return None
    return zigzag(pack.cu_seqlens_padded, ranks.cp, shared=pack.shared, device=ranks.device)


def _split(model: Model) -> Split:
    return Split(vocab_shard(model.padded_vocab_size, model.shape.vocab_size, model.ranks))


def vocab_shard(padded: int, vocab_size: int, ranks: Ranks) -> VocabShard:
    """This rank's part of a vocabulary. Args: padded: its size with padding."""
    width = padded // ranks.tp_size
    return VocabShard(ranks.tp_rank * width, width, vocab_size, ranks.tp)


def share_of(terms: Terms, pack: Pack) -> Terms:
    """The terms, zeroed where another context-parallel rank already counts them, so the sum counts everything once."""
    if terms.per == "token" or pack.cut is None or pack.cut.is_first:
        return terms
    metrics = {name: Mean(mean.total * 0, mean.count * 0) for name, mean in terms.metrics.items()}
    return replace(terms, numerator=terms.numerator * 0, weight=terms.weight * 0, metrics=metrics)


def _factor(norm: Norm, totals: Mapping[Norm, float], *, filled: int) -> float:
    """Multiplies each numerator so that their mean over filled micro-batches equals their sum / total."""
    if norm is Norm.MICRO_BATCH:
        return 1.0
    return filled / totals[norm] if totals[norm] > 0 else 0.0


def empty_undone(*, micro_batches: int, dp_size: int, filled: int) -> float:
    """The factor that turns a mean over all micro-batches (`micro_batches` on each of `dp_size` ranks) into a mean
    over the `filled` ones; empty micro-batches add nothing to the sum."""
    return micro_batches * dp_size / filled


def _scaled(optimizer: Optimizer, factor: float, loss: Tensor) -> Tensor:
    """megatron-core calls this on each loss before the backward pass."""
    return optimizer.scale_loss(loss) * factor


def _overlap(model: Model) -> None:
    """Sets hooks that delay gradient reduction to the last micro-batch and overlap it with backward, if enabled."""
    chunks = model.wrapped
    if chunks[0].ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        start = [chunk.start_grad_sync for chunk in chunks]
        model.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            model.config.grad_sync_func = start
    if chunks[0].ddp_config.overlap_param_gather:
        gather = [chunk.start_param_sync for chunk in chunks]
        model.config.param_sync_func = gather if len(chunks) > 1 else gather[0]
