"""Qwen3-30B-A3B with LoRA, 2K, on two GPUs (about 50 GiB each, estimated)."""

from megabatch import (
    Batch,
    Bridge,
    Checkpoint,
    Data,
    Kernels,
    LearningRate,
    Model,
    MoE,
    Parallel,
    Recipe,
    Recompute,
    Resources,
    Training,
    Tuner,
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="qwen3-moe-lora",
        task="sft",
        model=Model(model="Qwen/Qwen3-30B-A3B-Instruct-2507"),
        tuner=Tuner(tuner_type="lora", lora_rank=8, lora_alpha=32, target_modules=["all-linear"]),
        bridge=Bridge(use_hf=True, merge_lora=False),
        data=Data(
            dataset=["tatsu-lab/alpaca#2000"],
            max_length=2048,
            num_workers=8,
            dataset_num_proc=8,
            load_from_cache_file=True,
        ),
        batch=Batch(micro_batch_size=8, global_batch_size=16),
        training=Training(max_epochs=1),
        parallel=Parallel(expert_model_parallel_size=2),
        moe=MoE(
            moe_grouped_gemm=True,
            moe_permute_fusion=True,
            moe_shared_expert_overlap=True,
            moe_aux_loss_coeff=1e-3,
            moe_expert_capacity_factor=2,
        ),
        recompute=Recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        kernels=Kernels(attention_backend="flash", cross_entropy_loss_fusion=True),
        learning_rate=LearningRate(lr=1e-4, min_lr=1e-5, lr_warmup_fraction=0.05),
        checkpoint=Checkpoint(
            save="megatron_output/Qwen3-30B-A3B",
            save_interval=200,
            save_safetensors=True,
            finetune=True,
            no_save_optim=True,
            no_save_rng=True,
        ),
        resources=Resources(nodes=1, gpus_per_node=2, time="12:00:00"),
    )


if __name__ == "__main__":
    main(recipe)
