"""Llama-3.1-8B on samples of up to 128K tokens, each over four of a node's GPUs (about 48 GiB a GPU, estimated)"""

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
        name="long-context-sft",
        task="sft",
        model=Model(model="meta-llama/Llama-3.1-8B-Instruct"),
        bridge=Bridge(use_hf=True),
        data=Data(dataset=["THUDM/LongAlign-10k"], max_length=131072, packing=True, num_workers=4, dataset_num_proc=8),
        batch=Batch(micro_batch_size=1, global_batch_size=8),
        training=Training(max_epochs=2),
        parallel=Parallel(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=4),
        recompute=Recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        kernels=Kernels(transformer_impl="local", cross_entropy_loss_fusion=True),
        learning_rate=LearningRate(lr=1e-5, min_lr=1e-6, lr_warmup_fraction=0.05),
        checkpoint=Checkpoint(save_interval=100, save_safetensors=True, finetune=True),
        resources=Resources(nodes=1, gpus_per_node=8, time="24:00:00"),
    )


if __name__ == "__main__":
    main(recipe)
