"""Qwen2.5-7B-Instruct, full-parameter supervised fine-tuning on two GPUs with tensor parallelism."""

from megabatch import (
    Batch,
    Bridge,
    Checkpoint,
    Data,
    Kernels,
    LearningRate,
    Model,
    Parallel,
    Recipe,
    Recompute,
    Resources,
    Training,
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="qwen2.5-7b-sft",
        task="sft",
        model=Model(model="Qwen/Qwen2.5-7B-Instruct"),
        bridge=Bridge(use_hf=True),
        data=Data(dataset=["tatsu-lab/alpaca#1000"], max_length=2048, num_workers=4, dataset_num_proc=4),
        batch=Batch(micro_batch_size=16, global_batch_size=16),
        training=Training(max_epochs=1),
        parallel=Parallel(tensor_model_parallel_size=2, sequence_parallel=True),
        recompute=Recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        kernels=Kernels(cross_entropy_loss_fusion=True),
        learning_rate=LearningRate(lr=1e-5, min_lr=1e-6, lr_warmup_fraction=0.05),
        checkpoint=Checkpoint(
            save_interval=100,
            save_safetensors=True,
            finetune=True,
            no_save_optim=True,
            no_save_rng=True,
        ),
        resources=Resources(nodes=1, gpus_per_node=2, time="12:00:00"),
    )


if __name__ == "__main__":
    main(recipe)
