"""What a failed rank says, and whether its launcher tries again."""

from __future__ import annotations

import pytest

from megabatch.errors import CheckpointError, DataError, MegabatchError
from megabatch.run_directory import ExitCode
from megabatch.trainer import failures

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29573")


def wrapped(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as e:
            raise CheckpointError("step_00000002 cannot be loaded") from e
    except CheckpointError as e:
        return e


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MegabatchError("step 3: loss=nan"), ExitCode.FAILED, "error: step 3: loss=nan\n"),
        (DataError("a.jsonl:3"), ExitCode.CONFIG, "error: a.jsonl:3\n"),
        (RuntimeError("CUDA error: unspecified launch failure"), ExitCode.CRASHED, "RuntimeError: CUDA error"),
        (GLOO, ExitCode.CRASHED, "a rank that this one was talking to is gone"),
        (wrapped(GLOO), ExitCode.CRASHED, "a rank that this one was talking to is gone"),
        (wrapped(ConnectionRefusedError("Connection refused")), ExitCode.FAILED, "error: step_00000002 cannot be"),
    ],
)
def test_words_and_exit_code(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "_FIRST_S", 0)
    assert failures.report(error) == code
    words = capsys.readouterr().err
    assert said in words
    assert len(words.splitlines()) == 1


def test_codes_that_may_pass() -> None:
    assert {code for code in range(256) if ExitCode.may_pass(code)} == {70, 124, *range(129, 193)}
