"""GRPO on GSM8K without a GPU: a small Qwen3-MoE learns by reward to think first and to answer in tags.

Its start is that of `gsm8k_sft.py`, with a quarter of the solutions as `<think>…</think><answer>…</answer>`. GRPO then
sees no solution: it rewards that form, and the right answer, among eight samples of each question.

python recipes/gsm8k_grpo.py --local                    # or --submit
python recipes/gsm8k_grpo.py --demonstrations.dataset gsm8k_train.jsonl --by_reward.dataset gsm8k_train.jsonl --local
"""

import re
import zlib
from dataclasses import replace

from megabatch import (
    Batch,
    Bridge,
    Chain,
    Checkpoint,
    Data,
    Evaluation,
    Grpo,
    LearningRate,
    Logging,
    Model,
    MoE,
    Parallel,
    Recipe,
    Resources,
    Rlhf,
    Rollout,
    Step,
    Training,
    main,
    ok,
    output,
)

QUESTIONS = Data(dataset=["openai/gsm8k:main"], split_dataset_ratio=0.01, max_length=384, num_workers=0)
"""The same questions are held out of both steps."""
HUB = Bridge(use_hf=True)
GLOO = Parallel(distributed_backend="gloo")
RANKS = Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="1:00:00")
CALCULATIONS = re.compile(r"<<.*?>>")
"""GSM8K's notes for a calculator."""


def some_in_tags(row):
    """Every fourth solution in the form that GRPO rewards; which ones follows from the question."""
    thought, _, answer = CALCULATIONS.sub("", row["answer"]).partition("#### ")
    if zlib.crc32(row["question"].encode()) % 4:
        return {"query": row["question"], "response": f"{thought}#### {answer}"}
    return {"query": row["question"], "response": f"<think>{thought.strip()}</think><answer>{answer}</answer>"}


def demonstrations() -> Recipe:
    return Recipe(
        name="demonstrations",
        task="sft",
        model=Model(
            model_type="qwen3_moe",
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=256,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=32,
            padded_vocab_size=2048,
            max_position_embeddings=512,
            torch_dtype="float32",
        ),
        moe=MoE(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=128),
        bridge=HUB,
        data=replace(QUESTIONS, preprocess=f"{__file__}:some_in_tags"),
        batch=Batch(micro_batch_size=8, global_batch_size=32),
        training=Training(train_iters=300),
        parallel=GLOO,
        learning_rate=LearningRate(lr=3e-3, min_lr=3e-4, lr_warmup_iters=20),
        evaluation=Evaluation(eval_interval=100),
        logging=Logging(log_interval=10),
        checkpoint=Checkpoint(save_interval=300, save_total_limit=1),
        resources=RANKS,
    )


def by_reward() -> Recipe:
    return Recipe(
        name="by-reward",
        task="rlhf",
        model=Model(model=output("demonstrations").hf, torch_dtype="float32"),
        bridge=HUB,
        data=QUESTIONS,
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(num_generations=8, num_generations_eval=1, reward_funcs=["accuracy", "format"], beta=0.0),
        # below 1, samples are nearer to the most likely answers, which are what an evaluation looks at
        rollout=Rollout(temperature=0.7, max_completion_length=128),
        batch=Batch(micro_batch_size=4, global_batch_size=64),
        training=Training(train_iters=60),
        parallel=GLOO,
        learning_rate=LearningRate(lr=1e-3, min_lr=1e-4, lr_warmup_iters=3),
        evaluation=Evaluation(eval_on_start=True, eval_interval=20),
        logging=Logging(log_interval=1),
        checkpoint=Checkpoint(save_interval=60, save_total_limit=1),
        resources=RANKS,
    )


def recipe() -> Chain:
    """`reward_format` is the share of completions in the form; with `eval_` before it, of held-out questions."""
    return Chain(
        name="gsm8k-grpo",
        steps=[
            Step("demonstrations", demonstrations()),
            Step("by_reward", by_reward(), after=ok("demonstrations")),
        ],
    )


if __name__ == "__main__":
    main(recipe)
