"""Requests that are generated together: prompts padded on the left, one token of each at a time."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabatch.rollout.engine import Completion, Finish, Request
from megabatch.rollout.local.drawing import distribution, draw, seen_tokens
from megabatch.rollout.local.routing import Recorder


class Row:
    """One request while it is generated."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._random = random.Random(request.seed)
        self.ids: list[int] = []
        self._logps: list[float] = []
        self.routes: list[np.ndarray] = []
        """Of the tokens that the model has read, where they are recorded."""
        self.finish: Finish | None = None

    def uniform(self) -> float:
        """The next of the request's own numbers in [0, 1)."""
        return self._random.random()

    def take(self, token: int, logp: float) -> None:
        self.ids.append(token)
        self._logps.append(logp)
        if token in self.request.sampling.stop_ids:
            self.finish = "stop"
        elif len(self.ids) == self.request.sampling.max_tokens:
            self.finish = "length"

    def completion(self, version: int, recorder: Recorder | None) -> Completion:
        assert self.finish is not None
        ids, logps = tuple(self.ids), tuple(self._logps)
        return Completion(
            key=self.request.key,
            ids=ids,
            logps=logps,
            versions=(version,) * len(ids),
            finish=self.finish,
            routes=None if recorder is None else np.concatenate([*self.routes, recorder.behind()]),
        )


class Rows:
    """B rows, of which those that ended leave the batch once they are half of it."""

    def __init__(
        self,
        requests: Sequence[Request],
        model: Any,
        version: int,
        aborted: Collection[str],
        recorder: Recorder | None = None,
    ) -> None:
        """Args: model: a causal language model of transformers; aborted: keys of requests to end, may grow;
        recorder: of the model's routers."""
        from megabatch.rollout.local.keeping import growing_cache

        self._all = [Row(request) for request in requests]
        self._model, self._version, self._aborted, self._recorder = model, version, aborted, recorder
        self._cache = growing_cache(model.config)
        self._batch = list(self._all)
        prompts = [request.prompt for request in requests]
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._ids_BT = torch.tensor(padded, device=model.device)
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
        self._mask_BT = (torch.arange(longest, device=model.device) >= longest - lengths_B1).long()

    def completed(self) -> list[Completion]:
        while any(row.finish is None for row in self._batch):
            self._step()
        return [row.completion(self._version, self._recorder) for row in self._all]

    def _step(self) -> None:
        """One token of each row."""
        logps_BV = self._next_distribution()
        self._note_routes()
        # rows that ended but are still in the batch draw too, from nothing that is kept
        tokens_B = draw(logps_BV, [row.uniform() if row.finish is None else 0.0 for row in self._batch])
        drawn = logps_BV.gather(1, tokens_B[:, None])[:, 0]
        for row, token, logp in zip(self._batch, tokens_B.tolist(), drawn.tolist(), strict=True):
            if row.finish is None:
                row.take(token, logp)
                if row.request.key in self._aborted:
                    row.finish = "aborted"
        self._ids_BT = tokens_B[:, None]
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._ids_BT)], 1)
        self._drop_ended()

    def _next_distribution(self) -> Tensor:
        positions_BT = (self._mask_BT.cumsum(1) - 1).clamp(min=0)[:, -self._ids_BT.shape[1] :]
        output = self._model(
            self._ids_BT,
            attention_mask=self._mask_BT,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV = output.logits[:, -1]
        samplings = [row.request.sampling for row in self._batch]
        texts = [(*row.request.prompt, *row.ids) for row in self._batch]
        seen_BV = seen_tokens(texts, samplings, logits_BV.shape[-1])
        return distribution(logits_BV, samplings, None if seen_BV is None else seen_BV.to(logits_BV.device))

    def _note_routes(self) -> None:
        """Of what the model read last: of the prompt without its padding, or of one token."""
        if self._recorder is None:
            return
        for row, read in zip(self._batch, self._recorder.take(len(self._batch)), strict=True):
            if row.finish is None:
                row.routes.append(read[-len(row.request.prompt) :] if not row.ids else read)

    def _drop_ended(self) -> None:
        keep = [index for index, row in enumerate(self._batch) if row.finish is None]
        if keep and len(keep) * 2 <= len(self._batch):
            index_K = torch.tensor(keep, device=self._ids_BT.device)
            self._cache.batch_select_indices(index_K)
            self._ids_BT, self._mask_BT = self._ids_BT[index_K], self._mask_BT[index_K]
            self._batch = [self._batch[index] for index in keep]
