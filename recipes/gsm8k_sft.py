"""GSM8K with a small new Qwen3-MoE, its tokenizer trained on the data: minutes on two CPU cores.

python recipes/gsm8k_sft.py --dataset gsm8k_train.jsonl --val_dataset gsm8k_test.jsonl --local
python recipes/gsm8k_sft.py --nodes 2 --tasks_per_node 2 --submit
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
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="gsm8k-sft",
        task="sft",
        model=Model(
            model_type="qwen3_moe",
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=256,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=32,
            padded_vocab_size=2048,
            max_position_embeddings=512,
            torch_dtype="float32",
        ),
        moe=MoE(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=128),
        bridge=Bridge(use_hf=True),
        data=Data(
            dataset=["openai/gsm8k:main"],
            val_dataset=["openai/gsm8k:main:test#256"],
            max_length=512,
            num_workers=1,
        ),
        batch=Batch(micro_batch_size=8, global_batch_size=32),
        training=Training(train_iters=300),
        parallel=Parallel(distributed_backend="gloo"),
        learning_rate=LearningRate(lr=3e-3, min_lr=3e-4, lr_warmup_iters=20),
        evaluation=Evaluation(eval_on_start=True, eval_interval=50),
        logging=Logging(log_interval=10),
        checkpoint=Checkpoint(save_interval=150),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="1:00:00"),
    )


if __name__ == "__main__":
    main(recipe)
