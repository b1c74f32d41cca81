"""A process reward model without a GPU or a download: a small model tells right from wrong steps, on two processes.

python recipes/gsm8k_prm.py --local
python recipes/gsm8k_prm.py --model RUN/checkpoints/step_N/hf --dataset stepwise.jsonl --local
megabatch evaluate RUN --dataset held_out.jsonl
"""

from megabatch import (
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    LearningRate,
    Logging,
    Model,
    Parallel,
    Recipe,
    Resources,
    Rlhf,
    Training,
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="gsm8k-prm",
        task="rlhf",
        rlhf=Rlhf(rlhf_type="prm"),
        model=Model(
            model_type="qwen3",
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            padded_vocab_size=512,
            max_position_embeddings=512,
            torch_dtype="float32",
        ),
        data=Data(dataset=["example:arithmetic_steps#1600"], split_dataset_ratio=0.1, max_length=512, num_workers=0),
        batch=Batch(micro_batch_size=8, global_batch_size=32),
        training=Training(train_iters=160),
        parallel=Parallel(distributed_backend="gloo"),
        learning_rate=LearningRate(lr=3e-3, min_lr=3e-4, lr_warmup_iters=10),
        evaluation=Evaluation(eval_on_start=True, eval_interval=40),
        logging=Logging(log_interval=10),
        checkpoint=Checkpoint(
            save_interval=40, save_total_limit=1, metric_for_best_model="auc", greater_is_better=True
        ),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="0:30:00"),
    )


if __name__ == "__main__":
    main(recipe)
