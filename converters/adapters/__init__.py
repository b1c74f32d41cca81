"""LoRA adapters: PEFT's folders and megatron-core's checkpoints of them, converted and merged into weights."""
