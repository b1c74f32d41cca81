"""GRPO of Qwen2.5-7B on GSM8K: one node trains all parameters, vLLM generates on a second one.

python recipes/qwen2_5_7b_grpo_server.py --dry_run      # then --submit
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

MODEL = "Qwen/Qwen2.5-7B-Instruct"
SERVERS = Role(
    name="rollout",
    nodes=1,
    tasks_per_node=4,
    gpus_per_node=8,
    command=[
        *("python", "-m", "megabatch.cli", "rollout", MODEL),
        *("--tensor_parallel_size", "2", "--dtype", "bfloat16", "--max_model_len", "1024"),
    ],
)
"""Four servers of two GPUs each, which share the prompts."""


def recipe() -> Recipe:
    return Recipe(
        name="qwen2.5-7b-grpo-server",
        task="rlhf",
        model=Model(model=MODEL),
        bridge=Bridge(use_hf=True),
        data=Data(dataset=["openai/gsm8k:main:train"], val_dataset=["openai/gsm8k:main:test#256"], max_length=512),
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(
            num_generations=8,
            num_generations_eval=1,
            reward_funcs=["accuracy", "repetition"],
            loss_type="dapo",
            epsilon_high=0.28,
            beta=0.0,
            rollout_importance_sampling_mode="token_truncate",
        ),
        rollout=Rollout(vllm_mode="server", temperature=1.0, max_completion_length=512),
        batch=Batch(micro_batch_size=2, global_batch_size=128),
        training=Training(train_iters=200),
        parallel=Parallel(tensor_model_parallel_size=2, sequence_parallel=True),
        recompute=Recompute(recompute_granularity="selective"),
        kernels=Kernels(attention_backend="flash"),
        learning_rate=LearningRate(lr=1e-6, lr_warmup_iters=10),
        evaluation=Evaluation(eval_on_start=True, eval_interval=50),
        checkpoint=Checkpoint(
            save="megatron_output/qwen2.5-7b-grpo-server",
            save_interval=50,
            save_total_limit=2,
            metric_for_best_model="reward",
        ),
        resources=Resources(nodes=1, gpus_per_node=8, time="12:00:00"),
        roles=[SERVERS],
    )


if __name__ == "__main__":
    main(recipe)
