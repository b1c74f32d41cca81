"""What counts as a secret, and that it is not shown."""

from __future__ import annotations

from dataclasses import fields

import pytest

from megabatch.config.declare import group_types
from megabatch.config.recipe import Recipe
from megabatch.errors import Fault
from megabatch.secret_text import (
    is_secret_name,
    masked,
    secret_assigned_in,
    secret_given,
    secret_in,
    secrets_in_words,
    tokens_in,
)

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
    "glpat-" + "hunter2" * 3,
    "xoxb-" + "hunter2" * 3,
    "AIza" + "hunter2" * 5,
    "nvapi-" + "hunter2" * 5,
    "https://store/c/b?sv=2024-01-01&sig=hunter2%3D&se=1",
    "Authorization: Bearer hunter2xyz",
    "Proxy-Authorization: Basic hunter2xyz",
]
ORDINARY = [
    "", "nvcr.io#nvidia/pytorch:25.06-py3", "user@host#nvidia/x:1", "https://host/a@b", "/data/hf_cache/train.jsonl",
    "git@github.com:org/repo", "max_tokens=5", "https://host/?tokenizer_id=3", "sk-learn", "a:b@c", "Qwen/Qwen3-0.6B",
    "Authorization: Bearer $TOKEN", "https://host/?design=3&sigma=2", "bearer authentication", "xoxo",
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


SECRET_NAMES = """
    HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID wandb_apikey WANDB_APIKEY x-api-key apiKey api.key
    AZURE_STORAGE_KEY OPENAI_KEY AccountKey openai-key ENCRYPTION_KEY DB_PASS db_pass proxy-pass DB_PWD SMTP_PASSWORD
    SSH_PASSPHRASE key_passphrase CONSUL_HTTP_AUTH HTTP_AUTH basic-auth GITHUB_TOKEN_ORG token --token clientSecret
    GOOGLE_CREDENTIALS private_key
"""
ORDINARY_NAMES = """
    MASTER_PORT KEYBOARD SSH_AUTH_SOCK PASSTHROUGH PASS KEY NCCL_IB_HCA NCCL_DEBUG TOKENIZERS_PARALLELISM max_tokens
    tokenizer eos_token pad_token_id max_token_length calculate_per_token_loss moe_token_drop_policy image_token
    moe_token_dispatcher_type HF_TOKEN_PATH GOOGLE_CREDENTIALS_FILE text_key SORT_KEY PUBLIC_KEY forward_pass USE_AUTH
    no-auth PWD OLDPWD XAUTHORITY MONKEY query_key keys author AUTHOR_NAME bypass
"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ORDINARY_NAMES.split())
def test_ordinary_names(name: str) -> None:
    assert not is_secret_name(name)


def test_no_parameter_has_a_secrets_name_but_those_that_name_a_variable() -> None:
    names = {field.name for group in group_types(Recipe).values() for field in fields(group)}
    variables = {"judge_api_key_variable", "teacher_api_key_variable", "ref_api_key_variable"}
    assert {name for name in names if is_secret_name(name)} == {"hub_token", *variables}


@pytest.mark.parametrize("value", ["", "0", "True", "none", "HF_TOKEN"])
def test_switches_and_names_of_variables_are_no_secrets(value: str) -> None:
    assert secret_given("HF_HUB_DISABLE_IMPLICIT_TOKEN", value) is None
    assert secret_given("HF_HUB_DISABLE_IMPLICIT_TOKEN", value + "x")


def test_what_a_line_of_shell_gives() -> None:
    assert secret_assigned_in("export HF_TOKEN='abc'") == "HF_TOKEN"
    assert secret_assigned_in("x; curl --password abc") == "password"
    assert secret_assigned_in('{"a": 1, "api_key": "abc"}') == "api_key"
    assert secret_assigned_in('export HF_TOKEN="$(cat ~/.token)" HF_TOKEN=$T') is None, "no value is written there"
    assert secret_assigned_in("x --token $T; token=os.environ['T']; token=get('T'); --eos_token abc") is None


WORDS_WITH_SECRETS = [
    ["--token=hunter2"],
    ["--token=hunter(2"],
    ["--password", "hunter2"],
    ["-password", "hunter2"],
    ["--env", "HF_TOKEN=hunter2"],
    ["--export=ALL,HF_TOKEN=hunter2"],
    ["bash", "-c", "export OPENAI_KEY=hunter2\nexec ./x"],
    ["bash", "-c", "./x --db-pass 'hunter2' --y"],
    ["-H", "X-Api-Key: hunter2"],
    ["-H", "Authorization: Bearer hunter2xyz"],
    ["-H", "Authorization: Basic aHVudGVy"],
    ['{"api_key": "hunter2"}'],
    ["https://host/x?sig=hunter2"],
    ["glpat-" + "hunter2" * 3],
]
ORDINARY_WORDS = [
    ["--token", "$HF_TOKEN"],
    ["--token"],
    ["--token", "--verbose"],
    ["--hub_token", "HF_TOKEN"],
    ["--use_auth_token", "true"],
    ["--max_new_tokens", "512", "--eos_token", "<|im_end|>", "--calculate_per_token_loss", "yes"],
    ["-H", "Authorization: Bearer $MEGABATCH_ROLE_TOKEN"],
    ["bash", "-c", 'curl -H "Authorization: Bearer $T" --token "$T"'],
    ["python", "-c", "def f(token: str): return os.environ['HF_TOKEN']"],
    ["--password-file", "/run/password"],
    ["vllm", "serve", "Qwen/Qwen3-0.6B", "--port", "8000", "--key=messages"],
]


@pytest.mark.parametrize("words", WORDS_WITH_SECRETS)
def test_secrets_among_arguments(words: list[str]) -> None:
    assert list(secrets_in_words(["program", *words, "last"]))


@pytest.mark.parametrize("words", ORDINARY_WORDS)
def test_ordinary_arguments(words: list[str]) -> None:
    assert not list(secrets_in_words(["program", *words]))


def test_tokens_in_a_file_by_their_forms_alone() -> None:
    random = "aB3dE5gH7jK9mN1pQ3sT5vX7"
    tokens = [
        f"hf_{random}",
        f"ghp_{random}",
        f"sk-proj-{random}",
        f"glpat-{random}",
        f"xoxb-12345-{random}",
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
    assert [number for number, _ in tokens_in(text)] == [6, 7, 8, 9, 10, 11, 12]
