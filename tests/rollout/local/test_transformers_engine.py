"""The engine on transformers: its completions, their log-probabilities, its updates.

The reference is another model of transformers with the same weights, one full forward pass for each sequence.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import by_transformers

from megabatch.errors import RolloutError
from megabatch.rollout.bucket import Bucket, Part
from megabatch.rollout.engine import Completion, Request, Sampling
from megabatch.rollout.local.transformers_engine import TransformersEngine

VOCAB = 97
PLAIN = Sampling(temperature=1.0, max_tokens=12, stop_ids=())
SAMPLINGS = [
    PLAIN,
    Sampling(temperature=0.7, max_tokens=9, stop_ids=()),
    Sampling(temperature=1.2, top_k=8, top_p=0.9, repetition_penalty=1.3, max_tokens=5, stop_ids=()),
]


def made(kind: str, **more: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(5)
    common: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    if kind == "dense":
        return Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True)).eval()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts, **more)).eval()


def buckets(model: Any, *, cut: int = 3000) -> list[Bucket]:
    """Each tensor once, in pieces of at most `cut` bytes."""
    found = []
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        data = bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), cut):
            piece = data[start : start + cut]
            part = Part(name, "F32", tuple(tensor.shape), start, 0, len(piece))
            found.append(Bucket((part,), memoryview(piece)))
    return found


def update(engine: TransformersEngine, model: Any, version: int = 1) -> None:
    engine.begin_update(version)
    for bucket in buckets(model):
        engine.put(bucket)
    engine.end_update()


@pytest.fixture(scope="module", params=["dense", "experts"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TransformersEngine]:
    """(reference, engine) with equal weights."""
    model = made(request.param)
    folder: Path = tmp_path_factory.mktemp("model")
    model.config.save_pretrained(folder)
    engine = TransformersEngine(folder, dtype=torch.float32, device=torch.device("cpu"), max_rows=4)
    update(engine, model)
    return model, engine


def requests(count: int = 9) -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    prompts = [tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()) for length in lengths]
    return [
        Request(key=f"0/{n}", prompt=prompt, sampling=SAMPLINGS[n % len(SAMPLINGS)], seed=100 + n)
        for n, prompt in enumerate(prompts)
    ]


def test_log_probabilities_are_those_of_a_full_forward_pass(pair: tuple[Any, TransformersEngine]) -> None:
    model, engine = pair
    for request, made in zip(requests(), engine.generate(requests()), strict=True):
        ids = [*request.prompt, *made.ids]
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0]
        places = range(len(request.prompt), len(ids))
        rows = [by_transformers(logits_TV[t - 1], ids[:t], request.sampling)[ids[t]] for t in places]
        torch.testing.assert_close(torch.tensor(made.logps), torch.stack(rows), atol=1e-5, rtol=0)
        assert (made.key, made.finish, made.versions) == (request.key, "length", (1,) * len(made.ids))
        assert len(made.ids) == request.sampling.max_tokens


def test_experts_of_each_token_are_those_of_a_full_forward_pass(tmp_path: Path) -> None:
    """In a model whose first layer has none; of the last token, which the model has not read, anything follows."""
    model = made("experts", mlp_only_layers=[0])
    model.config.save_pretrained(tmp_path)
    engine = TransformersEngine(
        tmp_path, dtype=torch.float32, device=torch.device("cpu"), max_rows=4, records_routes=True
    )
    update(engine, model)
    for request, one in zip(requests(), engine.generate(requests()), strict=True):
        assert one.routes is not None and one.routes.dtype == np.uint8
        assert one.routes.shape == (len(request.prompt) + len(one.ids), 2, 2) and not one.routes[:-1, 0].any()
        with torch.no_grad():
            scores_TE = model(torch.tensor([[*request.prompt, *one.ids]]), output_router_logits=True).router_logits[-1]
        np.testing.assert_array_equal(one.routes[:-1, 1], scores_TE.topk(2).indices[:-1].numpy())


def test_a_model_without_routers_records_no_routes(tmp_path: Path) -> None:
    made("dense").config.save_pretrained(tmp_path)
    with pytest.raises(RolloutError, match="Qwen2ForCausalLM has no routers that megabatch can record; take R2"):
        TransformersEngine(tmp_path, dtype=torch.float32, device=torch.device("cpu"), records_routes=True)


def test_a_completion_does_not_depend_on_its_batch(pair: tuple[Any, TransformersEngine]) -> None:
    _, engine = pair
    together = tokens(engine.generate(requests()))
    assert tokens([one for request in requests() for one in engine.generate([request])]) == together
    assert tokens(engine.generate(requests()[::-1])[::-1]) == together
    other = [replace(request, seed=request.seed + 1) for request in requests()]
    assert tokens(engine.generate(other)) != together


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [one.ids for one in completions]


def test_a_stop_token_ends_its_own_row(pair: tuple[Any, TransformersEngine]) -> None:
    _, engine = pair
    free = engine.generate(requests())
    stop = free[0].ids[3]
    stopping = [replace(one, sampling=replace(one.sampling, stop_ids=(stop,))) for one in requests()]
    for before, after in zip(free, engine.generate(stopping), strict=True):
        length = before.ids.index(stop) + 1 if stop in before.ids else len(before.ids)
        assert after.ids == before.ids[:length]
        assert after.finish == ("stop" if stop in before.ids else "length")


def test_scores_are_those_of_a_full_forward_pass(pair: tuple[Any, TransformersEngine]) -> None:
    model, engine = pair
    sequences = [((1, 2, 3), (4, 5)), ((6,), (7, 8, 9, 10))]
    for (prompt, completion), found in zip(sequences, engine.score(sequences), strict=True):
        with torch.no_grad():
            logps_TV = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected = logps_TV[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


def test_an_update_changes_what_is_generated_and_its_version(pair: tuple[Any, TransformersEngine]) -> None:
    model, engine = pair
    before = engine.generate(requests())
    other = made("dense" if model.config.model_type == "qwen2" else "experts")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    update(engine, other, version=2)
    after = engine.generate(requests())
    assert {version for one in after for version in one.versions} == {2}
    assert tokens(after) != tokens(before)
    engine.sleep(2)
    with pytest.raises(RolloutError, match="sleeps; call wake first"):
        engine.generate(requests())
    engine.wake()
    with pytest.raises(RolloutError, match="has no weights"):
        engine.generate(requests())
    update(engine, model)
    assert engine.generate(requests()) == before


def test_an_update_that_misses_a_tensor_is_void(pair: tuple[Any, TransformersEngine]) -> None:
    model, engine = pair
    sent = buckets(model)
    name = sent[-1].parts[0].name
    engine.begin_update(3)
    for bucket in sent[:-1]:
        engine.put(bucket)
    with pytest.raises(RolloutError, match=rf"1 of .* tensors did not come exactly once, for example {name}"):
        engine.end_update()
    assert engine.version is None
    update(engine, model)


@pytest.mark.parametrize(
    ("part", "message"),
    [(Part("absent", "F32", (1,), 0, 0, 4), "absent F32 .* does not have"),
     (Part("model.norm.weight", "BF16", (32,), 0, 0, 64), "came as torch.bfloat16 .32., .* torch.float32")],
)  # fmt: skip
def test_foreign_tensors_are_refused(part: Part, message: str, pair: tuple[Any, TransformersEngine]) -> None:
    model, engine = pair
    data = bytearray(part.size)
    engine.begin_update(3)
    with pytest.raises(RolloutError, match=message):
        engine.put(Bucket((part,), memoryview(data)))
    engine.abort_update()
    update(engine, model)


def test_differing_names_tensors_whose_bytes_differ(pair: tuple[Any, TransformersEngine]) -> None:
    model, engine = pair
    assert not [name for bucket in buckets(model) for name in engine.differing(bucket)]
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    try:
        assert [name for bucket in buckets(model) for name in engine.differing(bucket)] == ["model.norm.weight"]
    finally:
        with torch.no_grad():
            model.model.norm.weight[3] = 1.0


def test_requests_are_aborted_from_another_thread(pair: tuple[Any, TransformersEngine]) -> None:
    _, engine = pair
    thread = threading.Thread(target=engine.abort, args=(["0/0"],))
    thread.start()
    thread.join()
    found = engine.generate(requests())
    assert [one.finish for one in found] == ["aborted", *["length"] * 8]
    assert len(found[0].ids) == 1


def test_prompts_that_do_not_fit_are_refused_by_name(pair: tuple[Any, TransformersEngine]) -> None:
    _, engine = pair
    for prompt, message in (((), "0/0: a prompt needs tokens"), ((VOCAB,), "between 0 and 96"),
                            ((1,) * 60, "0/0: 60 tokens .* 12 .* more than the model's 64 positions")):  # fmt: skip
        with pytest.raises(RolloutError, match=message):
            engine.generate([Request(key="0/0", prompt=prompt, sampling=PLAIN, seed=0)])
