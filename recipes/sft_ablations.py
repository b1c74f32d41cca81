"""Learning rate x seed for a tiny model on CPUs: one job array of ablations, without a GPU or a download.

python recipes/sft_ablations.py --submit        # or --local --max_parallel 2, or --dry_run
megabatch sweep show megatron_output/sft_ablations --by eval_loss
"""

from megabatch import (
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    LearningRate,
    Model,
    Parallel,
    Recipe,
    Resources,
    Sweep,
    Training,
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="sft-ablations",
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
        data=Data(dataset=["example:arithmetic#400"], split_dataset_ratio=0.1, max_length=256, num_workers=0),
        batch=Batch(micro_batch_size=8, global_batch_size=16),
        training=Training(train_iters=60),
        parallel=Parallel(distributed_backend="gloo"),
        learning_rate=LearningRate(lr=5e-3, lr_warmup_iters=5),
        evaluation=Evaluation(eval_interval=20),
        checkpoint=Checkpoint(save="megatron_output", save_interval=1000, save_total_limit=1),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=1, cpus_per_task=1, time="0:30:00"),
    )


ablations = Sweep(recipe, grid={"lr": [1e-3, 5e-3, 2e-2], "seed": [1, 2]}, max_parallel=4)

if __name__ == "__main__":
    main(ablations)
