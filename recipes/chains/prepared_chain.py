"""Tokenises on a node without GPUs first, then runs with the cache. The same on two CPU cores, without a download.

MEGABATCH_CACHE=/shared/cache python recipes/chains/prepared_chain.py --dry_run        # then --submit, or --local

With `--cluster NAME` the profile's `shared_cache` says where tokens lie, and MEGABATCH_CACHE may be left out.
"""

from pathlib import Path

from megabatch import (
    Batch,
    Chain,
    Command,
    Data,
    LearningRate,
    Model,
    Parallel,
    Recipe,
    Resources,
    Step,
    Training,
    main,
    ok,
)


def recipe() -> Recipe:
    """What `megabatch prepare` reads in this file, and what then trains."""
    return Recipe(
        name="prepared",
        task="sft",
        model=Model(
            model_type="qwen3",
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=16,
            padded_vocab_size=512,
            max_position_embeddings=256,
            torch_dtype="float32",
        ),
        data=Data(dataset=["example:arithmetic#200"], max_length=256, num_workers=0),
        batch=Batch(micro_batch_size=4, global_batch_size=16),
        training=Training(max_epochs=1),
        parallel=Parallel(tensor_model_parallel_size=2, distributed_backend="gloo"),
        learning_rate=LearningRate(lr=5e-3, lr_warmup_iters=2),
        resources=Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="0:30:00"),
    )


def chain() -> Chain:
    tokens = Command(
        ["python", "-P", "-m", "megabatch.cli", "prepare", str(Path(__file__).absolute())],
        resources=Resources(gpus_per_node=0, cpus_per_task=1, time="0:10:00"),
    )
    return Chain(name="prepared-chain", steps=[Step("tokens", tokens), Step("train", recipe(), after=ok("tokens"))])


if __name__ == "__main__":
    main(chain)
