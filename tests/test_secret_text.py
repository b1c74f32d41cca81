"""What counts as a secret, and that it is not shown."""

from __future__ import annotations

import pytest

from megabatch.errors import Fault
from megabatch.secret_text import SECRET_NAME, masked, secret_assigned_in, secret_in, tokens_in

SECRETS = [
    "https://someone:hunter2@host/data.jsonl",
    "docker://robot:pa$$word@registry.example/image",
    "https://hunter2@host/x",
    "s3://bucket/key?X-Amz-Signature=hunter2&x=1",
    "https://host/?api_key=hunter2",
    "hf_" + "hunter2" * 5,
    "ghp_" + "hunter2" * 5,
    "sk-" + "hunter2" * 5,
    "AKIAHUNTER2HUNTER234"[:20],
]
ORDINARY = [
    "", "nvcr.io#nvidia/pytorch:25.06-py3", "user@host#nvidia/x:1", "https://host/a@b", "/data/hf_cache/train.jsonl",
    "git@github.com:org/repo", "max_tokens=5", "https://host/?tokenizer_id=3", "sk-learn", "a:b@c", "Qwen/Qwen3-0.6B",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_recognised_and_masked(text: str) -> None:
    assert secret_in(text)
    shown = masked(f"before {text} after")
    assert "hunter2" not in shown.lower() and "pa$$word" not in shown
    assert shown.startswith("before ") and shown.endswith(" after")
    assert "hunter2" not in str(Fault("data.dataset", (text,), "does not exist")).lower()


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert secret_in(text) is None
    assert masked(text) == text


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "wandb_apikey", "x-api-key"])
def test_names(name: str) -> None:
    assert SECRET_NAME.search(name)
    assert secret_assigned_in(f"export {name}='abc'") == name


def test_ordinary_names() -> None:
    assert not [
        name for name in ("max_tokens", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PASS") if SECRET_NAME.search(name)
    ]
    assert secret_assigned_in('export HF_TOKEN="$(cat ~/.token)" HF_TOKEN=$T') is None, "no value is written there"


def test_tokens_in_a_file_by_their_forms_alone() -> None:
    random = "aB3dE5gH7jK9mN1pQ3sT5vX7"
    tokens = [
        f"hf_{random}",
        f"ghp_{random}",
        f"sk-proj-{random}",
        "AKIAABCDEFGHIJKLMNOP",
        "-----BEGIN PRIVATE KEY-----",
    ]
    code = [
        "password = ask()",
        "sk-learn-pipelines-of-2024",
        "hf_checkpointconversionfolder",
        "https://host/?token=x",
        "",
    ]
    text = "\n".join([*code, *(f'key = "{token}"' for token in tokens)])
    assert [number for number, _ in tokens_in(text)] == [6, 7, 8, 9, 10]
