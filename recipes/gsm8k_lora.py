"""LoRA without a GPU or a download: adapters beside a small Qwen3-MoE learn word problems, on two CPU processes.

python recipes/gsm8k_lora.py --local
python recipes/gsm8k_lora.py --dataset gsm8k_train.jsonl --local
"""

from megabatch import (
    Batch,
    Bridge,
    Checkpoint,
    Data,
    Evaluation,
    LearningRate,
    Logging,
    Model,
    MoE,
    Parallel,
    Recipe,
    Resources,
    Training,
    Tuner,
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="gsm8k-lora",
        task="sft",
        model=Model(
            model_type="qwen3_moe",
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            padded_vocab_size=512,
            max_position_embeddings=512,
            torch_dtype="float32",
        ),
        moe=MoE(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=64),
        tuner=Tuner(
            tuner_type="lora",
            lora_rank=16,
            lora_alpha=32,
            target_modules=["all-linear", "all-embedding", "output_layer"],
        ),
        bridge=Bridge(merge_lora=False),
        data=Data(dataset=["example:arithmetic#400"], split_dataset_ratio=0.1, max_length=512, num_workers=0),
        batch=Batch(micro_batch_size=4, global_batch_size=16),
        training=Training(train_iters=100),
        parallel=Parallel(expert_model_parallel_size=2, distributed_backend="gloo"),
        learning_rate=LearningRate(lr=1e-2, min_lr=1e-3, lr_warmup_iters=5),
        evaluation=Evaluation(eval_on_start=True, eval_interval=25),
        logging=Logging(log_interval=5),
        checkpoint=Checkpoint(save_interval=50, save_total_limit=1),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="0:30:00"),
    )


if __name__ == "__main__":
    main(recipe)
