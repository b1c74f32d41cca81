"""GRPO, and the engines that generate its completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megabatch.config.declare import freeze_lists, param
from megabatch.values import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Grpo:
    """Group relative policy optimisation. Batch sizes count completions."""

    beta: float = param(0.04, at_least=0)
    """Weight of the KL term; 0 needs no reference model."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "real", "fipo"] = param("grpo")
    """How the loss is averaged (grpo, bnpo, dr_grpo, dapo), or which surrogate it uses (cispo, sapo, real, fipo)."""
    advantage_estimator: Literal["grpo", "rloo", "reinforce_plus_plus"] = param("grpo")
    """What a reward is compared with: its group's mean (grpo), the mean of the group's others (rloo), or the group's
    mean before scaling over the batch (reinforce_plus_plus)."""
    kl_in_reward: bool | None = param(None)
    """Subtracts the KL term from the reward instead of adding it to the loss; None means yes for rloo and
    reinforce_plus_plus, no for grpo and for `scale_rewards` gdpo."""
    num_generations: int = param(8, at_least=2)
    """Completions per prompt (G)."""
    num_generations_eval: int | None = param(None, at_least=1)
    """Completions per prompt in an evaluation; None means `num_generations`."""
    steps_per_generation: int = param(1, at_least=1)
    """Optimizer steps per round of generation."""
    generation_batch_size: int | None = param(None, at_least=1)
    """Completions per round of generation; None means `global_batch_size * steps_per_generation`."""
    num_iterations: int = param(1, at_least=1)
    """How often each completion is used for an update (mu)."""
    infer_batch_size: int | None = param(None, at_least=1)
    """Completions in a micro-batch of the passes that only compute log-probabilities: of the policy before a round's
    steps, the reference and a teacher. They keep no activations, so more fit than in training; None takes
    whole prompts, up to 16 completions, as far as that leaves the plan's peak of memory as it is."""
    reward_funcs: Sequence[str] = param(())
    """Rewards: accuracy, format, cosine, repetition, soft_overlong, or your own as `file.py:function`."""
    reward_weights: Sequence[float] | None = param(None)
    """Weight of each reward, reward models last; None weighs them equally."""
    reward_model: Sequence[str] = param(())
    """Folders or hub names of reward models, whose scores are rewards after those of `reward_funcs`."""
    reward_model_plugin: Sequence[str] = param(())
    """For each reward model what turns its output into a reward: `default`, or your own as `file.py:function`."""
    cosine_min_len_value_wrong: float = param(-0.5)
    """Reward `cosine`: of a wrong answer of length 0."""
    cosine_max_len_value_wrong: float = param(0.0)
    """Reward `cosine`: of a wrong answer of the maximum length."""
    cosine_min_len_value_correct: float = param(1.0)
    """Reward `cosine`: of a right answer of length 0."""
    cosine_max_len_value_correct: float = param(0.5)
    """Reward `cosine`: of a right answer of the maximum length."""
    cosine_max_len: int | None = param(None, at_least=1)
    """Reward `cosine`: tokens of the maximum length; None means `max_completion_length`."""
    repetition_n_grams: int = param(3, at_least=1)
    """Reward `repetition`: words of a phrase whose repetition counts."""
    repetition_max_penalty: float = param(-1.0, at_most=0)
    """Reward `repetition`: of a completion that only repeats itself."""
    soft_max_length: int | None = param(None, at_least=1)
    """Reward `soft_overlong`: tokens from which the penalty is 1; None means `max_completion_length`."""
    soft_cache_length: int | None = param(None, at_least=1)
    """Reward `soft_overlong`: tokens below `soft_max_length` over which the penalty grows from 0."""
    scale_rewards: Literal["group", "batch", "none", "gdpo"] | None = param(None)
    """Standard deviation that advantages are divided by; gdpo normalises each reward first. None means group for
    grpo, none for rloo, batch for reinforce_plus_plus."""
    epsilon: float = param(0.2, at_least=0)
    """Clipping: the ratio stays above 1 - epsilon, and below 1 + `epsilon_high`."""
    epsilon_high: float | None = param(None, at_least=0)
    """Upper clipping range; None means `epsilon`."""
    delta: float | None = param(None, above=0)
    """Upper bound of the ratio for negative advantages, above 1 + epsilon; None sets none."""
    tau_pos: float = param(1.0, above=0)
    """Temperature of sapo's gate for positive advantages."""
    tau_neg: float = param(1.05, above=0)
    """Temperature of sapo's gate for negative advantages."""
    real_tau: float = param(0.5, above=0)
    """Temperature of real, whose micro-batches must hold whole groups."""
    fipo_decay_rate: float = param(32.0, above=0)
    """Tokens after which a token's influence on the past halves, in fipo."""
    fipo_clip_range: float = param(0.2, at_least=0)
    """Clipping range of fipo's influence weight around 1; 0 does not clip."""
    fipo_clip_high_only: bool = param(True)
    """Clips only values of the influence weight above 1, to between 1 and 1 + `fipo_clip_range`."""
    fipo_safety_threshold: float = param(4.0, above=0)
    """Ratio above which a token with a negative advantage gets no influence weight above 1, in fipo."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = param("token")
    """Ratio for each token, for each sequence (GSPO), or the sequence's with the token's gradient."""
    dynamic_sample: bool = param(False)
    """Generates again for prompts whose completions all have the same reward."""
    max_resample_times: int = param(3, at_least=1)
    """Number of tries of `dynamic_sample`."""
    overlong_filter: bool = param(False)
    """Excludes truncated completions from the loss."""
    off_policy_sequence_mask_delta: float | None = param(None)
    """Excludes sequences with a negative advantage whose mean log-ratio old - current exceeds this; with
    `async_generate`, drawn - current."""
    rollout_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = param(None)
    """Correction for the difference between the policy's probabilities when a round begins to be trained on and those
    that its tokens were drawn with; None means token_truncate with `async_generate`, and no correction otherwise."""
    rollout_importance_sampling_threshold: float = param(2.0, above=0)
    """Ratio above which that correction truncates or masks."""
    top_entropy_quantile: float = param(1.0, above=0, at_most=1)
    """Fraction of the step's tokens that the loss keeps, those of the highest entropy."""
    log_entropy: bool = param(False)
    """Logs the entropy of the policy's distribution at the completions' tokens."""
    router_replay_mode: Literal["disabled", "R2", "R3"] = param(
        "disabled",
    )
    """Routes tokens as before: as the policy did when log-probabilities were computed (R2), or as the rollout engine
    did (R3), which must be transformers inside the ranks."""
    teacher_kl_coef: float = param(1.0, at_least=0)
    """Weight of a teacher's log-probability minus the policy's as an advantage of each token; for `teacher_model` or
    `teacher_model_server`."""
    log_rollout_offpolicy_metrics: bool = param(False)
    """Logs that difference even without a correction."""
    log_completions: bool = param(False)
    """Sends the four best and worst completions of each step to the tracker of `report_to`; the ledger has all."""

    def __post_init__(self) -> None:
        freeze_lists(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Generation: sampling, the engine, and the memory that the trainer frees for it."""

    temperature: float = param(0.9, above=0)
    """Temperature of sampling and of the probabilities in the loss."""
    top_p: float = param(1.0, above=0, at_most=1)
    """Samples from the likeliest tokens that together have this probability."""
    top_k: int = param(-1, at_least=-1)
    """Samples from this many likeliest tokens; -1 and 0 mean all."""
    repetition_penalty: float = param(1.0, above=0)
    """Divides the odds of tokens that have occurred; 1 changes nothing."""
    max_completion_length: int = param(512, at_least=1)
    """Longest completion in tokens."""
    ledger_gib: float = param(16.0, above=0)
    """Disk space for completions in the run directory's `ledger/`, in GiB; the oldest steps make room for new ones."""
    completion_length_limit_scope: Literal["per_round", "total"] = param("per_round")
    """Whether `max_completion_length` limits each turn of a conversation with several turns, or all together."""
    multi_turn_scheduler: str | None = param(None)
    """What answers the model's turns: `calculator`, or your own as `file.py:Class`."""
    turn_timeout_s: float = param(60.0, above=0)
    """Seconds that an answer to a turn may take; a conversation without one ends there."""
    max_turns: int | None = param(None, at_least=1)
    """Most turns of a conversation; None sets no limit."""
    use_gym_env: bool = param(False)
    """Adds the sum of the environment's rewards as the reward `environment`, the last of `reward_weights`."""
    gym_env: str | None = param(None)
    """The same as `multi_turn_scheduler`, for environments with rewards of their own."""
    use_vllm: bool | None = param(None)
    """Whether vLLM generates, or transformers inside the trainer; None means vLLM where `vllm_mode` is given."""
    async_generate: bool = param(False)
    """Has vLLM's servers generate the next rounds while this one is trained on; completions that an update of the
    weights interrupts go on with the new ones."""
    max_staleness: int = param(1, at_least=1)
    """With `async_generate`: rounds that generation is ahead of training, and so most updates of the engines' weights
    between the policy that begins a completion and the one that trains on it."""
    vllm_mode: Literal["server", "colocate"] | None = param(None)
    """vLLM in its own server process, or inside the trainer's; None generates with transformers inside the trainer."""
    vllm_server_host: str | None = param(None)
    """Server's host."""
    vllm_server_port: int = param(8000, at_least=1, at_most=65535)
    """Server's port."""
    vllm_server_base_url: str | None = param(None)
    """Server's address, instead of host and port; several with commas between them."""
    vllm_server_timeout: float = param(240.0, above=0)
    """How long to wait for the server, in seconds."""
    vllm_server_pass_dataset: bool = param(False)
    """Gives a sample's other columns to multi-turn schedulers. These run beside rank 0 and always get
    them; recipes that set it run as they are."""
    vllm_tensor_parallel_size: int = param(1, at_least=1)
    """Neighbouring ranks that share an engine's matrices with `vllm_mode="colocate"`, as do the settings below."""
    vllm_gpu_memory_utilization: float = param(0.9, above=0, at_most=1)
    """Fraction of a GPU's memory that the engine may use; on CPUs of the machine's, where the default stands for 1 GiB
    of keys and values."""
    vllm_max_model_len: int | None = param(None, at_least=1)
    """Longest prompt plus completion in tokens; None means the model's limit."""
    vllm_enforce_eager: bool = param(False)
    """Runs the engine without CUDA graphs."""
    vllm_limit_mm_per_prompt: Mapping[str, int] | None = param(None, built=False)
    """Number of images and other media that a prompt may have, by kind; on the command line as a JSON object."""
    vllm_enable_prefix_caching: bool = param(True)
    """Reuses the computation of common prompt beginnings."""
    vllm_max_num_seqs: int | None = param(None, at_least=1)
    """Completions that the engine computes at a time; None leaves it to vLLM."""
    vllm_disable_cascade_attn: bool = param(False)
    """Switches off the engine's cascade attention."""
    vllm_mm_processor_cache_gb: float | None = param(None, built=False, at_least=0)
    """Size of the engine's cache of processed media, in GB; None leaves it to vLLM."""
    vllm_engine_kwargs: Mapping[str, Any] | None = param(None)
    """More arguments of the engine, by vLLM's names; on the command line as a JSON object."""
    vllm_server_group_port: int | None = param(None, at_least=1, at_most=65535)
    """Port at which trainer and servers form the group that weights travel in; None takes a free one."""
    vllm_enable_lora: bool = param(False)
    """Sends LoRA's adapter to vLLM instead of merged weights; servers are started with `--lora_rank`."""
    sync_tolerance: float | None = param(None, above=0)
    """Largest difference of a token's log-probability between trainer and engine after weights were sent, above which
    the run stops; None means 1e-3 in float32 and 0.5 otherwise."""
    sleep_level: Literal[0, 1, 2] = param(0)
    """What the engine frees during training: nothing, its cache, or its weights too."""
    offload_optimizer: bool = param(False)
    """Moves optimizer state to host memory while engines inside the ranks generate."""
    offload_model: bool = param(False)
    """Moves the trained model to host memory, and frees its gradients, while engines inside the ranks generate."""
    move_model_batches: int | None = param(
        None,
        built=False,
        refused="is ZeRO-3's: weights always reach the engine in buckets of bounded size",
        at_least=1,
    )
    """Parts in which weights are gathered for the engine."""
    use_ray: bool = param(False, built=False, refused="needs no Ray: Slurm starts ranks and engines")
    """Places trainer and engines with Ray."""
