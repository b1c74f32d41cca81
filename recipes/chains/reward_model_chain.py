"""Alignment as one graph of jobs, on CPUs without a download: answers, a judge of answers, and GRPO on its scores.

supervised → judge (a reward model, from pairs of right and wrong solutions) → aligned (GRPO on the judge's scores)

python recipes/chains/reward_model_chain.py --local       # or --submit
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

GLOO = Parallel(distributed_backend="gloo")
RANKS = Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="0:30:00")


def supervised() -> Recipe:
    return Recipe(
        name="supervised",
        task="sft",
        model=Model(
            model_type="qwen3",
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            padded_vocab_size=512,
            max_position_embeddings=256,
            torch_dtype="float32",
        ),
        data=Data(dataset=["example:arithmetic#2000"], split_dataset_ratio=0.05, max_length=256, num_workers=0),
        batch=Batch(micro_batch_size=8, global_batch_size=32),
        training=Training(train_iters=300),
        parallel=GLOO,
        learning_rate=LearningRate(lr=3e-3, min_lr=3e-4, lr_warmup_iters=20),
        evaluation=Evaluation(eval_interval=100),
        logging=Logging(log_interval=50),
        checkpoint=Checkpoint(save_interval=300, save_total_limit=1),
        resources=RANKS,
    )


def judge() -> Recipe:
    return Recipe(
        name="judge",
        task="rlhf",
        model=Model(model=output("supervised").hf, torch_dtype="float32"),
        data=Data(dataset=["example:arithmetic_pairs#2000"], split_dataset_ratio=0.05, max_length=256, num_workers=0),
        rlhf=Rlhf(rlhf_type="rm"),
        batch=Batch(micro_batch_size=8, global_batch_size=32),
        training=Training(train_iters=150),
        parallel=GLOO,
        learning_rate=LearningRate(lr=1e-3, min_lr=1e-4, lr_warmup_iters=10),
        evaluation=Evaluation(eval_on_start=True, eval_interval=50),
        logging=Logging(log_interval=50),
        checkpoint=Checkpoint(save_interval=150, save_total_limit=1),
        resources=RANKS,
    )


def aligned() -> Recipe:
    return Recipe(
        name="aligned",
        task="rlhf",
        model=Model(model=output("supervised").hf, torch_dtype="float32"),
        data=Data(dataset=["example:arithmetic#800"], split_dataset_ratio=0.05, max_length=128, num_workers=0),
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(num_generations=4, num_generations_eval=1, reward_model=[output("judge").hf], beta=0.02),
        rollout=Rollout(temperature=1.0, max_completion_length=96),
        batch=Batch(micro_batch_size=4, global_batch_size=32),
        training=Training(train_iters=20),
        parallel=GLOO,
        learning_rate=LearningRate(lr=3e-4, lr_warmup_iters=2),
        evaluation=Evaluation(eval_on_start=True, eval_interval=10),
        logging=Logging(log_interval=5),
        checkpoint=Checkpoint(save_interval=20, save_total_limit=1),
        resources=RANKS,
    )


def recipe() -> Chain:
    """`eval_reward` of the last step is the judge's mean score of held-out problems, before and after."""
    return Chain(
        name="reward-model",
        steps=[
            Step("supervised", supervised()),
            Step("judge", judge(), after=ok("supervised")),
            Step("aligned", aligned(), after=ok("judge")),
        ],
    )


if __name__ == "__main__":
    main(recipe)
