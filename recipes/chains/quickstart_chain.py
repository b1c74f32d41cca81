"""A chain without a GPU or a download: train, convert, train on, export, compare with transformers; note a failure.

python recipes/chains/quickstart_chain.py --dry_run        # then --submit, or --local
"""

from megabatch import (
    Batch,
    Chain,
    Checkpoint,
    Command,
    ConversionRequest,
    Convert,
    Data,
    LearningRate,
    Model,
    Parallel,
    Recipe,
    Resources,
    Step,
    Training,
    main,
    notok,
    ok,
    output,
)

RANKS = Resources(nodes=1, gpus_per_node=0, tasks_per_node=2, time="0:30:00")
TASKS = Resources(nodes=1, gpus_per_node=0, tasks_per_node=1, time="0:10:00")


def training(name: str, *, model: Model, checkpoint: Checkpoint) -> Recipe:
    return Recipe(
        name=name,
        task="sft",
        model=model,
        data=Data(dataset=["example:arithmetic#200"], max_length=256, num_workers=0),
        batch=Batch(micro_batch_size=4, global_batch_size=16),
        training=Training(train_iters=10),
        parallel=Parallel(tensor_model_parallel_size=2, distributed_backend="gloo"),
        learning_rate=LearningRate(lr=5e-3, lr_warmup_iters=2),
        checkpoint=checkpoint,
        resources=RANKS,
    )


def recipe() -> Chain:
    small = Model(
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
    )
    first = training("first", model=small, checkpoint=Checkpoint())
    second = training(
        "second",
        model=Model(model=output("first").hf),
        checkpoint=Checkpoint(load=output("convert").mcore, finetune=True),
    )
    return Chain(
        name="quickstart-chain",
        steps=[
            Step("first", first),
            Step(
                "convert",
                Convert(ConversionRequest(to_mcore=True, model=output("first").hf), resources=TASKS),
                after=ok("first"),
            ),
            Step("second", second, after=ok("convert")),
            Step(
                "export",
                Convert(
                    ConversionRequest(to_hf=True, mcore_model=output("second").mcore, model=output("first").hf),
                    verify=True,
                    resources=TASKS,
                ),
                after=ok("second"),
            ),
            Step(
                "compare",
                Command(
                    ["python", "-m", "megabatch.trainer.precision", output("export").hf, output("second").mcore],
                    resources=TASKS,
                ),
                after=ok("export"),
            ),
            Step(
                "report", Command(["echo", "the export failed or never ran"], resources=TASKS), after=notok("export")
            ),
        ],
    )


if __name__ == "__main__":
    main(recipe)
