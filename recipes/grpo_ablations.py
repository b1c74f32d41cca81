"""GRPO ablations on Qwen2.5-7B as one job array: how the loss is averaged x weight of the KL term x seed.

python recipes/grpo_ablations.py --dry_run      # the table and the array's script; then --submit
megabatch sweep show megatron_output/grpo_ablations      # ranked by held-out reward, with means over seeds
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
    Rollout,
    Sweep,
    Training,
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="grpo-ablations",
        task="rlhf",
        model=Model(model="Qwen/Qwen2.5-7B-Instruct"),
        bridge=Bridge(use_hf=True),
        data=Data(dataset=["openai/gsm8k:main:train"], val_dataset=["openai/gsm8k:main:test#256"], max_length=512),
        rlhf=Rlhf(rlhf_type="grpo"),
        grpo=Grpo(num_generations=8, num_generations_eval=1, reward_funcs=["accuracy", "repetition"]),
        rollout=Rollout(temperature=1.0, max_completion_length=512, sleep_level=1),
        batch=Batch(micro_batch_size=4, global_batch_size=128),
        training=Training(train_iters=200),
        parallel=Parallel(tensor_model_parallel_size=2, sequence_parallel=True),
        recompute=Recompute(recompute_granularity="selective"),
        kernels=Kernels(attention_backend="flash"),
        learning_rate=LearningRate(lr=1e-6),
        evaluation=Evaluation(eval_on_start=True, eval_interval=50),
        checkpoint=Checkpoint(
            save="megatron_output", save_interval=100, save_total_limit=1, metric_for_best_model="reward"
        ),
        resources=Resources(nodes=1, gpus_per_node=8, time="12:00:00"),
    )


ablations = Sweep(
    recipe,
    grid={"loss_type": ["grpo", "dr_grpo", "dapo"], "beta": [0.0, 0.04], "seed": [1, 2, 3]},
    max_parallel=4,
)

if __name__ == "__main__":
    main(ablations)
