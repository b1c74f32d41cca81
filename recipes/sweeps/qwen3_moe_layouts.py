"""Which layout trains Qwen3-30B-A3B fastest? Full fine-tuning at 8K on two 8-GPU nodes, 30 steps each.

python recipes/sweeps/qwen3_moe_layouts.py --dry_run      # every layout: kept or left out, and why
"""

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
    Sweep,
    Training,
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="qwen3-moe-layouts",
        task="sft",
        model=Model(model="Qwen/Qwen3-30B-A3B-Instruct-2507"),
        bridge=Bridge(use_hf=True),
        data=Data(dataset=["tatsu-lab/alpaca#5000"], max_length=8192, packing=True, num_workers=8, dataset_num_proc=8),
        batch=Batch(micro_batch_size=1, global_batch_size=32),
        training=Training(train_iters=30),
        parallel=Parallel(overlap_grad_reduce=True, overlap_param_gather=True),
        moe=MoE(moe_grouped_gemm=True, moe_permute_fusion=True, moe_aux_loss_coeff=1e-6),
        recompute=Recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        kernels=Kernels(attention_backend="flash", cross_entropy_loss_fusion=True),
        learning_rate=LearningRate(lr=1e-5, min_lr=1e-6),
        checkpoint=Checkpoint(
            save="megatron_output/qwen3_moe", save_interval=1000, no_save_optim=True, no_save_rng=True
        ),
        resources=Resources(nodes=2, gpus_per_node=8, time="1:00:00"),
    )


layouts = Sweep(
    recipe,
    zip={"tensor_model_parallel_size": [1, 2, 4], "sequence_parallel": [False, True, True]},
    grid={"pipeline_model_parallel_size": [1, 2], "expert_model_parallel_size": [2, 4, 8]},
    max_parallel=4,
)

if __name__ == "__main__":
    main(layouts)
