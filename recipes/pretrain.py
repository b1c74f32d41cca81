"""Continued pre-training of Qwen2.5-7B on plain text, 4K packed, on four GPUs with tensor parallelism.

python recipes/pretrain.py --dataset /path/to/pretrain_data.jsonl --submit      # lines like {"text": "…"}
"""

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
        name="pretrain",
        task="pt",
        model=Model(model="Qwen/Qwen2.5-7B"),
        bridge=Bridge(use_hf=True),
        data=Data(dataset=["NeelNanda/pile-10k"], max_length=4096, packing=True),
        batch=Batch(micro_batch_size=4, global_batch_size=32),
        training=Training(max_epochs=1),
        parallel=Parallel(tensor_model_parallel_size=2, sequence_parallel=True),
        recompute=Recompute(recompute_granularity="selective"),
        kernels=Kernels(cross_entropy_loss_fusion=True),
        learning_rate=LearningRate(lr=1e-5),
        checkpoint=Checkpoint(
            save="megatron_output/pretrain",
            save_safetensors=True,
            finetune=True,
            no_save_optim=True,
            no_save_rng=True,
        ),
        resources=Resources(nodes=1, gpus_per_node=4, time="24:00:00"),
    )


if __name__ == "__main__":
    main(recipe)
