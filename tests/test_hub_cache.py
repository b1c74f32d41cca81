"""Models found where hubs' own clients keep them, laid out as the clients do; and converted by their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megabatch.converters.adapters.open import base_model_of, base_weights_of
from megabatch.converters.conversion import make_plan
from megabatch.converters.hf_model import find_folder
from megabatch.converters.request import ConversionRequest
from megabatch.errors import ConversionError
from megabatch.hub_cache import cached_folder, is_hub_name


def hugging_face(home: Path, name: str) -> Path:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    for commit in ("aaa", "bbb"):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    return repository / "snapshots" / "bbb"


def modelscope(cache: Path, name: str) -> Path:
    folder = cache / "models" / name.replace(".", "___")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_clients_cache_is_asked_the_chosen_hubs_first(caches: Path) -> None:
    assert cached_folder("org/Model-1.5", use_hf=True) is None
    theirs = modelscope(caches / "ms", "org/Model-1.5")
    assert cached_folder("org/Model-1.5", use_hf=True) == theirs
    ours = hugging_face(caches / "hf", "org/Model-1.5")
    assert cached_folder("org/Model-1.5", use_hf=True) == ours
    assert cached_folder("org/Model-1.5", use_hf=False) == theirs


def test_a_jobs_own_caches_alone_are_asked_when_they_are_given(caches: Path) -> None:
    hugging_face(caches / "hf", "org/name")
    shared = hugging_face(caches / "shared", "org/name")
    assert cached_folder("org/name", use_hf=True, environment={"HF_HOME": str(caches / "shared")}) == shared


def test_a_converters_model_may_be_a_hubs_name(caches: Path) -> None:
    folder = hugging_face(caches / "hf", "org/name")
    assert find_folder("org/name") == folder
    (caches / "org" / "name").mkdir(parents=True)
    assert find_folder("org/name") == Path("org/name")  # a folder that is there comes first
    with pytest.raises(
        ConversionError,
        match=r"^org/other: there is no folder .*`hf download org/other` or `modelscope download --model",
    ):
        make_plan(ConversionRequest(to_mcore=True, model="org/other"))
    with pytest.raises(ConversionError, match=r"^/no/such/folder: there is no folder .*organisation/name"):
        make_plan(ConversionRequest(to_mcore=True, model="/no/such/folder"))


def test_a_folder_that_is_not_there_is_said_with_what_is_nearly_called_so(caches: Path) -> None:
    (caches / "models" / "Qwen3-0.6B").mkdir(parents=True)
    (caches / "file").write_text("")
    for given, message in {
        "model": rf"^model: there is no folder {caches}/model, and it is not the name of .*; did you mean models\?$",
        "models/Qwen3-0.6": rf"^models/Qwen3-0.6: there is no folder {caches}/models/Qwen3-0.6, and no hub's cache .*"
        r"; did you mean models/Qwen3-0.6B\?$",
        f"{caches}/modles/Qwen3-0.6B": rf"did you mean {caches}/models/Qwen3-0.6B\?$",
        f"{caches}/modles/Llama/part": rf"did you mean {caches}/models\?$",
        "zzzz": r"`hf download organisation/name`\)$",
        "file": "^file: is a file; name the folder of the model$",
    }.items():
        with pytest.raises(ConversionError, match=message):
            make_plan(ConversionRequest(to_mcore=True, model=given))
    with pytest.raises(ConversionError, match=r"^there is no folder modles; did you mean models\?$"):
        make_plan(ConversionRequest(to_hf=True, mcore_model="modles"))


@pytest.mark.parametrize(
    ("name", "may_be"), [("Qwen/Qwen3-0.6B", True), ("folder", False), ("/a/b", False), ("a/b/c", False)]
)
def test_names_that_a_hub_can_have(name: str, may_be: bool) -> None:
    assert is_hub_name(name) is may_be


def test_a_revision_is_found_by_its_branch_or_commit_and_no_other_stands_in(caches: Path) -> None:
    newest = hugging_face(caches / "hf", "org/name")
    (newest.parents[1] / "refs" / "v1").write_text("aaa")
    modelscope(caches / "ms", "org/name")
    for revision in ("v1", "aaa"):
        assert find_folder("org/name", revision=revision) == newest.with_name("aaa")
    with pytest.raises(ConversionError, match=r"has its revision v2; .*`hf download org/name --revision v2`"):
        find_folder("org/name", revision="v2")


def test_the_base_of_an_adapter_is_the_revision_that_it_names(caches: Path) -> None:
    newest, adapter = hugging_face(caches / "hf", "org/name"), caches / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/name"}
    for revision, folder in ((None, newest), ("aaa", newest.with_name("aaa"))):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "revision": revision}))
        assert base_weights_of([adapter]) == folder
        assert base_model_of(adapter) == folder
