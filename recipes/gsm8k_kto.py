"""KTO without a GPU or a download: a small model learns from solutions that are labelled right or wrong.

python recipes/gsm8k_kto.py --local
python recipes/gsm8k_kto.py --model RUN/checkpoints/step_N/hf --dataset labels.jsonl --local
python recipes/gsm8k_kto.py --dataset solutions.jsonl --preprocess recipes/rows/model_solutions.py:labels --local

KTO begins with a model that can answer: train one with gsm8k_sft.py first. A new model shows how the recipe runs, and
learns which solutions are wrong, not to write right ones.
"""

from megabatch import (
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    Kto,
    LearningRate,
    Logging,
    Model,
    Parallel,
    Recipe,
    Resources,
    Rlhf,
    Training,
    main,
)


def recipe() -> Recipe:
    return Recipe(
        name="gsm8k-kto",
        task="rlhf",
        rlhf=Rlhf(rlhf_type="kto"),
        kto=Kto(beta=0.1),
        model=Model(
            model_type="qwen3",
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
        data=Data(dataset=["example:arithmetic_labels#1200"], split_dataset_ratio=0.1, max_length=512, num_workers=0),
        batch=Batch(micro_batch_size=4, global_batch_size=16),
        training=Training(train_iters=120),
        parallel=Parallel(distributed_backend="gloo"),
        learning_rate=LearningRate(lr=3e-3, min_lr=3e-4, lr_warmup_iters=10),
        evaluation=Evaluation(eval_on_start=True, eval_interval=30),
        logging=Logging(log_interval=10),
        checkpoint=Checkpoint(save_interval=60, save_total_limit=1),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="0:30:00"),
    )


if __name__ == "__main__":
    main(recipe)
