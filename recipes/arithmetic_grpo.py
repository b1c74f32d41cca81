"""GRPO without a GPU or a download: a tiny model unlearns a bad habit by reward alone, on one CPU process.

Its demonstrations add three digits, and most of them leave the last one out. Supervised training learns that habit, so
that the most likely answer to a sum that it has not seen is wrong. GRPO then sees no demonstration: it rewards right
answers among eight samples of each prompt.

python recipes/arithmetic_grpo.py --local

The second step generates with vLLM inside its rank (docs/rollouts.md), where Python has it:

python recipes/arithmetic_grpo.py --local --demonstrations.kv_channels 32 --by_reward.vllm_mode colocate \\
    --by_reward.vllm_enforce_eager true --by_reward.vllm_max_num_seqs 128
"""

from megabatch import (
    Batch,
    Chain,
    Checkpoint,
    Data,
    Evaluation,
    Grpo,
    LearningRate,
    Logging,
    Model,
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

SUMS = Data(dataset=["example:hasty_sums#1000"], split_dataset_ratio=0.1, max_length=64, num_workers=0)
"""The same 100 sums are held out of both steps."""
GLOO = Parallel(distributed_backend="gloo")
RANKS = Resources(nodes=1, gpus_per_node=0, tasks_per_node=1, time="0:30:00")


def right(completions, solution, **columns):
    """1 for the sum itself, 0 for anything else."""
    return [float(text.strip() == answer) for text, answer in zip(completions, solution, strict=True)]


def demonstrations() -> Recipe:
    return Recipe(
        name="demonstrations",
        task="sft",
        model=Model(
            model_type="qwen3",
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            padded_vocab_size=320,
            max_position_embeddings=128,
            torch_dtype="float32",
        ),
        data=SUMS,
        batch=Batch(micro_batch_size=32, global_batch_size=32),
        training=Training(train_iters=2000),
        parallel=GLOO,
        learning_rate=LearningRate(lr=3e-3, min_lr=1e-4, lr_warmup_iters=50),
        evaluation=Evaluation(eval_interval=500),
        logging=Logging(log_interval=100),
        checkpoint=Checkpoint(save_interval=2000, save_total_limit=1),
        resources=RANKS,
    )


def by_reward() -> Recipe:
    return Recipe(
        name="by-reward",
        task="rlhf",
        model=Model(model=output("demonstrations").hf, torch_dtype="float32"),
        data=SUMS,
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(num_generations=8, num_generations_eval=1, reward_funcs=[f"{__file__}:right"], beta=0.0),
        rollout=Rollout(temperature=1.0, max_completion_length=8),
        batch=Batch(micro_batch_size=16, global_batch_size=128),
        training=Training(train_iters=200),
        parallel=GLOO,
        learning_rate=LearningRate(lr=1e-3, min_lr=1e-4, lr_warmup_iters=5),
        evaluation=Evaluation(eval_on_start=True, eval_interval=40),
        logging=Logging(log_interval=10),
        checkpoint=Checkpoint(save_interval=200, save_total_limit=1),
        resources=RANKS,
    )


def recipe() -> Chain:
    """Held-out accuracy is `eval_reward` of the second step's metrics, of its most likely answers."""
    return Chain(
        name="arithmetic-grpo",
        steps=[
            Step("demonstrations", demonstrations()),
            Step("by_reward", by_reward(), after=ok("demonstrations")),
        ],
    )


if __name__ == "__main__":
    main(recipe)
