"""Qwen3-30B-A3B supervised fine-tuning, 8K packed, on one node of 8 GPUs (about 70 GiB each, estimated)."""

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
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="qwen3-moe-sft",
        task="sft",
        model=Model(model="Qwen/Qwen3-30B-A3B-Instruct-2507"),
        bridge=Bridge(use_hf=True),
        data=Data(
            dataset=["tatsu-lab/alpaca#20000"],
            max_length=8192,
            packing=True,
            num_workers=8,
            dataset_num_proc=8,
            load_from_cache_file=True,
        ),
        batch=Batch(micro_batch_size=1, global_batch_size=4),
        training=Training(max_epochs=1),
        parallel=Parallel(
            tensor_model_parallel_size=4,
            pipeline_model_parallel_size=2,
            decoder_first_pipeline_num_layers=25,
            expert_model_parallel_size=4,
            sequence_parallel=True,
        ),
        moe=MoE(
            moe_grouped_gemm=True,
            moe_permute_fusion=True,
            moe_shared_expert_overlap=True,
            moe_aux_loss_coeff=1e-6,
            moe_expert_capacity_factor=2,
        ),
        recompute=Recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        kernels=Kernels(attention_backend="flash", cross_entropy_loss_fusion=True),
        learning_rate=LearningRate(lr=1e-5, min_lr=1e-6, lr_warmup_fraction=0.05),
        checkpoint=Checkpoint(
            save="megatron_output/Qwen3-30B-A3B",
            save_interval=500,
            save_safetensors=True,
            finetune=True,
            no_save_optim=True,
            no_save_rng=True,
        ),
        resources=Resources(nodes=1, gpus_per_node=8, time="24:00:00"),
    )


if __name__ == "__main__":
    main(recipe)
