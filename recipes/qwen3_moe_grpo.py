"""GSPO of Qwen3-30B-A3B on GSM8K: two nodes train all parameters, vLLM generates on a third one.

Experts that route a token otherwise in vLLM than in the trainer make ratios of single tokens noisy; GSPO takes the
ratio of the whole completion (arXiv:2507.18071), and clips it in its own, much narrower range.

python recipes/qwen3_moe_grpo.py --dry_run      # then --submit
"""

from megabatch import (
    Batch,
    Bridge,
    Checkpoint,
    Data,
    Evaluation,
    Grpo,
    Kernels,
    LearningRate,
    Model,
    MoE,
    Parallel,
    Recipe,
    Recompute,
    Resources,
    Rlhf,
    Role,
    Rollout,
    Training,
    main,
)

MODEL = "Qwen/Qwen3-30B-A3B-Instruct-2507"
SERVERS = Role(
    name="rollout",
    nodes=1,
    tasks_per_node=2,
    gpus_per_node=8,
    command=[
        *("python", "-m", "megabatch.cli", "rollout", MODEL),
        *("--tensor_parallel_size", "4", "--dtype", "bfloat16", "--max_model_len", "2560"),
    ],
)
"""Two servers of four GPUs each, which share the prompts."""


def recipe() -> Recipe:
    return Recipe(
        name="qwen3-moe-grpo",
        task="rlhf",
        model=Model(model=MODEL),
        bridge=Bridge(use_hf=True),
        data=Data(dataset=["openai/gsm8k:main:train"], val_dataset=["openai/gsm8k:main:test#256"], max_length=512),
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(
            num_generations=8,
            num_generations_eval=1,
            steps_per_generation=4,
            reward_funcs=["accuracy", "soft_overlong"],
            soft_cache_length=512,
            importance_sampling_level="sequence",
            epsilon=3e-4,
            epsilon_high=4e-4,
            beta=0.0,
            rollout_importance_sampling_mode="sequence_mask",
        ),
        rollout=Rollout(vllm_mode="server", temperature=1.0, max_completion_length=2048),
        batch=Batch(micro_batch_size=1, global_batch_size=128),
        training=Training(train_iters=200),
        parallel=Parallel(
            tensor_model_parallel_size=4,
            pipeline_model_parallel_size=2,
            expert_model_parallel_size=8,
            sequence_parallel=True,
        ),
        moe=MoE(moe_grouped_gemm=True, moe_permute_fusion=True, moe_aux_loss_coeff=0.0),
        recompute=Recompute(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        kernels=Kernels(attention_backend="flash"),
        learning_rate=LearningRate(lr=1e-6, lr_warmup_iters=10),
        evaluation=Evaluation(eval_on_start=True, eval_interval=50),
        checkpoint=Checkpoint(
            save="megatron_output/qwen3-moe-grpo", save_interval=50, save_total_limit=2, metric_for_best_model="reward"
        ),
        resources=Resources(nodes=2, gpus_per_node=8, time="24:00:00"),
        roles=[SERVERS],
    )


if __name__ == "__main__":
    main(recipe)
