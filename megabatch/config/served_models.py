"""Frozen models behind servers that a run asks for log-probabilities: a teacher, a reference."""

from __future__ import annotations

from megabatch.config.recipe import Recipe
from megabatch.config.rlhf import Gkd
from megabatch.values import dataclass

ROLE = "role:"
"""Begins the address of a role of the job."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One of them, as recipes name its settings."""

    what: str
    group: str
    server: str
    key_variable: str
    timeout: str

    @property
    def field(self) -> str:
        return f"{self.group}.{self.server}"

    def named(self, recipe: Recipe) -> str | None:
        """Its servers; None where it is in the ranks, or there is none."""
        found: str | None = getattr(getattr(recipe, self.group), self.server)
        return found

    def key_variable_of(self, recipe: Recipe) -> str | None:
        found: str | None = getattr(getattr(recipe, self.group), self.key_variable)
        return found

    def timeout_s(self, recipe: Recipe) -> float:
        return float(getattr(getattr(recipe, self.group), self.timeout))


TEACHER = ServedModel("teacher", "gkd", "teacher_model_server", "teacher_api_key_variable", "teacher_server_timeout")
REFERENCE = ServedModel("reference", "rlhf", "ref_model_server", "ref_api_key_variable", "ref_server_timeout")


def addresses_named(text: str) -> list[str]:
    """http://host:port, or role:NAME, of servers with one model, which are named with commas between them."""
    return [one.strip() for one in text.split(",")]


def has_teacher(gkd: Gkd) -> bool:
    """Whether a teacher is named, in the ranks or behind servers."""
    return gkd.teacher_model is not None or gkd.teacher_model_server is not None
