"""Models behind servers: found, and compared with the trained model before the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megabatch.config.lengths import row_tokens
from megabatch.config.resolved import resolved
from megabatch.config.run import RunConfig
from megabatch.config.served_models import REFERENCE, ROLE, TEACHER, ServedModel, addresses_named
from megabatch.config.several_teachers import teachers_named
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.errors import ConfigError
from megabatch.rollout.vllm.client import Client
from megabatch.rollout.vllm.guard import TOKEN
from megabatch.rollout.vllm.scoring import ScoringServer, ScoringServers, Wanted
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.objectives import grpo
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.sync.scored import ServedLogps, ServedTeacher

logger = logging.getLogger(__name__)
_TEXT = "In 2026, 3.14 × 27 = 84.78; naïve café, 東京 — def f(x):\n\treturn x ** 2  # ok?"
"""Words, numbers, spaces and letters of several alphabets, which tokenizers cut differently."""
_AT_A_TIME = 64
"""Requests of the whole run at one server: with many more, one could wait longer than a request may take."""


def served_teacher(run: RunConfig, source: ModelSource, ranks: Ranks) -> ServedTeacher:
    """Of distillation; collective.

    Raises: ConfigError, RolloutError on every rank if a server does not answer, or does not fit.
    """
    group = run.recipe.gkd
    count, found = resolved(group.gkd_logits_topk), []
    longest = min(resolved(run.recipe.data.max_length) + _written(run), run.shape.max_position_embeddings)
    wanted = Wanted(vocab_size=run.shape.vocab_size, longest=longest, likeliest=count)
    for one in teachers_named(resolved(group.teacher_model_server), "url"):
        found.append(_servers(run, TEACHER, one.where, wanted))
        if one.tags:
            logger.info("it teaches rows with %s=%s", group.teacher_tag_key, " or ".join(one.tags))
    _open(found, source, ranks)
    return ServedTeacher(found, ranks, count=count)


@dataclass(frozen=True, slots=True)
class Served:
    """GRPO's models behind servers."""

    logps: Mapping[str, ServedLogps]
    """By the column of their log-probabilities."""
    takes: int | None
    """Tokens of the longest sequence that all of them take; None without any."""


def served_logps(run: RunConfig, source: ModelSource, ranks: Ranks) -> Served:
    """Collective. Raises: as above."""
    recipe, found = run.recipe, {}
    wanted = Wanted(
        vocab_size=run.shape.vocab_size,
        longest=resolved(row_tokens(recipe, run.shape)),
        temperature=recipe.rollout.temperature,
    )
    for column, model in ((grpo.REFERENCE, REFERENCE), (grpo.TEACHER, TEACHER)):
        if (where := model.named(recipe)) is not None:
            found[column] = _servers(run, model, where, wanted)
    takes = _open(list(found.values()), source, ranks)
    return Served({column: ServedLogps(servers, ranks) for column, servers in found.items()}, takes)


def _written(run: RunConfig) -> int:
    """Most tokens that the student adds to a row."""
    return run.recipe.rollout.max_completion_length if run.recipe.gkd.lmbda else 0


def _servers(run: RunConfig, model: ServedModel, where: str, wanted: Wanted) -> ScoringServers:
    found, timeout_s = [], model.timeout_s(run.recipe)
    for named in addresses_named(where):
        addresses, token = _addresses(run, model, named)
        for address in addresses:
            name = f"{model.field}={named}{f' ({address})' if named != address else ''}"
            client = Client(address, token=token, timeout_s=timeout_s)
            found.append(ScoringServer(client, name, wanted, timeout_s=timeout_s))
            logger.info("the %s is behind %s", model.what, address)
    return ScoringServers(found, each=max(1, _AT_A_TIME // run.layout.dp))


def _addresses(run: RunConfig, model: ServedModel, named: str) -> tuple[list[str], str | None]:
    """Addresses and token of servers."""
    if named.startswith(ROLE):
        role = named.removeprefix(ROLE)
        addresses = os.environ.get(f"MEGABATCH_ROLE_{role.upper()}")
        if not addresses:
            raise ConfigError(f"{model.field}={named}: this job has no role {role}; add it to the roles")
        return addresses.split(","), os.environ.get(TOKEN)
    variable = model.key_variable_of(run.recipe)
    if variable is not None and not os.environ.get(variable):
        field = f"{model.group}.{model.key_variable}"
        raise ConfigError(f"{field}={variable} is not set; export it in the submitting shell")
    address = named.rstrip("/").removesuffix("/v1")
    return [address], None if variable is None else os.environ[variable]


def _open(found: Sequence[ScoringServers], source: ModelSource, ranks: Ranks) -> int | None:
    """What all of them take (`ScoringServer.open`)."""

    def opened() -> int:
        probes = _probes(source)
        return min(servers.open(probes) for servers in found)

    return ranks.on_main(opened) if found else None


def _probes(source: ModelSource) -> Mapping[str, Sequence[int]]:
    """Texts with the trained model's tokens of them: any text, and each special token."""
    tokenizer = tokenizers.load(source.tokenizer)
    texts = (_TEXT, *tokenizer.all_special_tokens)
    return {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
