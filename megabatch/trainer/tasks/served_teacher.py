"""The teacher behind a server: found, and compared with the student before the first step."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

from megabatch.config.resolved import resolved
from megabatch.config.rlhf import Gkd
from megabatch.config.run import RunConfig
from megabatch.config.several_teachers import teachers_named
from megabatch.data.tokens import tokenizer as tokenizers
from megabatch.errors import ConfigError
from megabatch.rollout.vllm.client import Client
from megabatch.rollout.vllm.guard import TOKEN
from megabatch.rollout.vllm.teacher import TeacherServer
from megabatch.trainer.model_source import ModelSource
from megabatch.trainer.ranks import Ranks
from megabatch.trainer.sync.teacher import ServedTeacher

logger = logging.getLogger(__name__)
_ROLE = "role:"
_TEXT = "In 2026, 3.14 × 27 = 84.78; naïve café, 東京 — def f(x):\n\treturn x ** 2  # ok?"
"""Words, numbers, spaces and letters of several alphabets, which tokenizers cut differently."""


def served_teacher(run: RunConfig, source: ModelSource, ranks: Ranks) -> ServedTeacher:
    """Collective. Raises: ConfigError, RolloutError on every rank if the server does not answer, or does not fit."""
    group = run.recipe.gkd
    count, timeout_s, servers = resolved(group.gkd_logits_topk), group.teacher_server_timeout, []
    for one in teachers_named(resolved(group.teacher_model_server), "url"):
        address, token = _address(group, one.where)
        client = Client(address, token=token, timeout_s=timeout_s)
        servers.append(TeacherServer(client, count=count, vocab_size=run.shape.vocab_size, timeout_s=timeout_s))
        whose = f"of rows with {group.teacher_tag_key}={' or '.join(one.tags)} " if one.tags else ""
        logger.info("the teacher %sis behind %s", whose, address)
    ranks.on_main(lambda: _open(servers, _probes(source), longest=_longest(run)))
    return ServedTeacher(servers, ranks, count=count)


def _open(servers: Sequence[TeacherServer], probes: Mapping[str, Sequence[int]], *, longest: int) -> None:
    for server in servers:
        server.open(probes, longest=longest)


def _address(group: Gkd, named: str) -> tuple[str, str | None]:
    """Address and token of a server."""
    if named.startswith(_ROLE):
        role = named.removeprefix(_ROLE)
        addresses = os.environ.get(f"MEGABATCH_ROLE_{role.upper()}")
        if not addresses:
            raise ConfigError(f"gkd.teacher_model_server={named}: this job has no role {role}; add it to the roles")
        return addresses.split(",")[0], os.environ.get(TOKEN)
    variable = group.teacher_api_key_variable
    if variable is not None and not os.environ.get(variable):
        raise ConfigError(f"gkd.teacher_api_key_variable={variable} is not set; export it in the submitting shell")
    return named.strip().rstrip("/").removesuffix("/v1"), None if variable is None else os.environ[variable]


def _probes(source: ModelSource) -> Mapping[str, Sequence[int]]:
    """Texts with the student's tokens of them: any text, and each special token."""
    tokenizer = tokenizers.load(source.tokenizer)
    texts = (_TEXT, *tokenizer.all_special_tokens)
    return {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}


def _longest(run: RunConfig) -> int:
    """Tokens of the longest sequence that the run may ask about."""
    recipe = run.recipe
    written = recipe.rollout.max_completion_length if recipe.gkd.lmbda else 0
    return min(resolved(recipe.data.max_length) + written, run.shape.max_position_embeddings)
