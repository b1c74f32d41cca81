"""Distillation without a GPU or a download: a teacher learns word problems, and a smaller new model learns from it.

python recipes/gsm8k_gkd.py --local       # or --submit

`eval_divergence` of the step `student` is its distance from the teacher on held-out solutions, before and after.
"""

from megabatch import (
    Batch,
    Chain,
    Checkpoint,
    Data,
    Evaluation,
    Gkd,
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

ROWS = Data(dataset=["example:arithmetic#2000"], split_dataset_ratio=0.05, max_length=256, num_workers=0)
GLOO = Parallel(distributed_backend="gloo")
RANKS = Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="0:30:00")


def teacher() -> Recipe:
    return Recipe(
        name="teacher",
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
        data=ROWS,
        batch=Batch(micro_batch_size=8, global_batch_size=32),
        training=Training(train_iters=300),
        parallel=GLOO,
        learning_rate=LearningRate(lr=3e-3, min_lr=3e-4, lr_warmup_iters=20),
        evaluation=Evaluation(eval_interval=100),
        logging=Logging(log_interval=50),
        checkpoint=Checkpoint(save_interval=300, save_total_limit=1),
        resources=RANKS,
    )


def student() -> Recipe:
    return Recipe(
        name="student",
        task="rlhf",
        model=Model(
            model_type="qwen3",
            tokenizer=output("teacher").hf,
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=2,
            num_query_groups=1,
            kv_channels=16,
            padded_vocab_size=512,
            max_position_embeddings=256,
            torch_dtype="float32",
        ),
        data=ROWS,
        rlhf=Rlhf(rlhf_type="gkd"),
        gkd=Gkd(teacher_model=output("teacher").hf, beta=0.0, lmbda=0.0),
        rollout=Rollout(temperature=1.0),
        batch=Batch(micro_batch_size=8, global_batch_size=32),
        training=Training(train_iters=150),
        parallel=GLOO,
        learning_rate=LearningRate(lr=5e-3, min_lr=5e-4, lr_warmup_iters=10),
        evaluation=Evaluation(eval_on_start=True, eval_interval=50),
        logging=Logging(log_interval=10),
        checkpoint=Checkpoint(save_interval=50, save_total_limit=1),
        resources=RANKS,
    )


def recipe() -> Chain:
    return Chain(
        name="gsm8k-gkd",
        steps=[Step("teacher", teacher()), Step("student", student(), after=ok("teacher"))],
    )


if __name__ == "__main__":
    main(recipe)
