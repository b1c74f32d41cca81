"""README, and the tree of docs/tree.md, which `make golden` writes from the modules' first lines."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
README, TREE = ROOT / "README.md", ROOT / "docs" / "tree.md"
BEGIN = "<!-- tree: written by make golden from the first line of each module -->\n"
END = "<!-- end of tree -->"
ROOMS = {
    "recipes": "runs to start from; loaded by path, not installed",
    "recipes/chains": "graphs of jobs",
    "recipes/rows": "functions for `preprocess`: rows of published files as rows of a task",
    "recipes/sweeps": "sweeps over parallel layouts",
    "megabatch": "the installed package: config, plan, entry, command line, trainer",
    "slurm": "installed as megabatch.slurm: scripts, submission, state, private clusters; no torch",
    "converters": "installed as megabatch.converters: Hugging Face and megatron-core checkpoints; no torch",
    "tests": "mirror the tree",
    "docs": "recipes, parameters, Slurm, architecture, decisions",
    "megabatch/chain": "chains of jobs: declared, checked, submitted or run here",
    "megabatch/cli": "the command lines: a recipe file's, and megabatch",
    "megabatch/config": "every parameter, declared once; rules; flags; run.json",
    "megabatch/config/rules": "what must hold between parameters",
    "megabatch/data": "from datasets to the order of samples; no torch",
    "megabatch/data/cache": "tokenised datasets on disk",
    "megabatch/data/rows": "rows of datasets: files, hubs, formats",
    "megabatch/data/tokens": "rows to tokens and loss weights: chat templates, tokenizers",
    "megabatch/doctor": "checks of a machine",
    "megabatch/entry": "one launch: planned, judged, written, and submitted or run here",
    "megabatch/insight": "what the files of runs tell: goodput, causes of failure, differences, reports",
    "megabatch/ledger": "every completion that a run trained on, on disk, within a limit",
    "megabatch/plan": "pure arithmetic: layouts, batches, stages, sizes",
    "megabatch/rehearse": "proofs on this machine: runs resume bit for bit, layouts compute what one process does",
    "megabatch/rewards": "what completions are worth: shipped rewards, users' functions, in processes of their own",
    "megabatch/rl": "GRPO's formulas: advantages, corrections, losses of tokens",
    "megabatch/rollout": "what a rollout engine is, and the engines",
    "megabatch/rollout/local": "engines inside the process that uses them, on torch",
    "megabatch/rollout/turns": "conversations of several turns: environments and tools answer the model",
    "megabatch/rollout/vllm": "vLLM's own server: started, given weights, asked for completions",
    "megabatch/saved": "checkpoints at rest: digests, checking, which one a run goes on from; no torch",
    "megabatch/sweep": "one recipe at many points: table, arrays, results",
    "megabatch/trainer": "the only room with torch and megatron-core",
    "megabatch/trainer/checkpoints": "saving and loading a run's state",
    "megabatch/trainer/data": "each rank's batches, as tensors",
    "megabatch/trainer/evaluation": "measures of a whole evaluation set, by task",
    "megabatch/trainer/exports": "what checkpoints hold for others to load",
    "megabatch/trainer/model": "megatron-core models of our families",
    "megabatch/trainer/model/lora": "LoRA below megatron-core's layers",
    "megabatch/trainer/objectives": "losses, as numerators with a named denominator",
    "megabatch/trainer/ops": "collectives inside autograd",
    "megabatch/trainer/readouts": "what is read from a model's output, for a loss or on its own",
    "megabatch/trainer/rl": "GRPO's rounds: prompts, generation, rewards, steps, evaluation",
    "megabatch/trainer/sync": "live weights to rollout engines, and the proof that they arrived",
    "megabatch/trainer/tasks": "one module for each task: its steps, loss, evaluation and export",
    "megabatch/trainer/watching": "metrics and where they go, and what is done about steps that look wrong",
    "megabatch/trainer/preflight": "one node's part of the step that looks for bad nodes before the ranks start",
    "slurm/script": "the sections of a batch script",
    "converters/adapters": "LoRA adapters, PEFT's and megatron-core's: converted, merged",
    "converters/command": "the megabatch-convert command",
    "converters/engine": "plan, execute, journal, commit, verify: what a conversion does",
    "converters/families": "one mapping table for each model family",
    "converters/safetensors_io": "safetensors by byte ranges",
    "converters/torch_dist": "megatron-core's checkpoint format by byte ranges",
}
LONGEST = 88


def _phrase(path: Path) -> str:
    """The module's first line without its full stop, cut where its main clause ends if it is long."""
    line = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].rstrip(".")
    while len(line) > LONGEST and (cut := re.search(r"^(.*)(?:[:;] |\. )", line)):
        line = cut[1]
    return line


def _tree() -> str:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.split()  # fmt: skip
    lines: list[str] = []
    for room in ("recipes", "megabatch", "slurm", "converters"):
        files = [Path(name) for name in tracked if name.startswith(f"{room}/") and name.endswith(".py")]
        lines += _folder(Path(room), [path for path in files if (ROOT / path).exists()], depth=0)
    return "\n".join(lines + [f"    {name + '/':30} {ROOMS[name]}" for name in ("tests", "docs")])


def _folder(folder: Path, files: list[Path], *, depth: int) -> list[str]:
    assert folder.as_posix() in ROOMS, f"a new folder: say in ROOMS what {folder} is for, then make golden"
    indent = "    " + "  " * depth
    lines = [f"{indent}{folder.name + '/':{30 - 2 * depth}} {ROOMS[folder.as_posix()]}"]
    for child in sorted({path.relative_to(folder).parts[0] for path in files}):
        below = folder / child
        if below.suffix != ".py":
            lines += _folder(below, [path for path in files if below in path.parents], depth=depth + 1)
        elif child not in ("__init__.py", "__main__.py"):
            lines.append(f"{indent}  {child:{28 - 2 * depth}} {_phrase(ROOT / below)}")
    return lines


def test_the_tree_is_current() -> None:
    text = TREE.read_text()
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    new = f"\n{_tree()}\n\n"
    if os.environ.get("MEGABATCH_GOLDEN") == "1":
        TREE.write_text(before + BEGIN + new + END + after)
        return
    assert old == new, "files have changed; run: make golden"


def test_its_first_commands_are_the_two(tmp_path: Path) -> None:
    code = [line.strip() for line in README.read_text().splitlines() if line.startswith("    ")]
    assert code[0].startswith("make demo") and code[1].startswith("make test")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "check", "golden", "docs", "bench", "cluster", "cluster-down"} <= targets


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())
    assert len(links) > 4
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_files_where_new_things_go_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("## Where a new thing goes\n")[1].split("\n## ")[0]
    places = [place for place in re.findall(r"`([\w./]+/[\w.]*)`", table) if place]
    assert len(places) > 15
    roots = (ROOT, ROOT / "megabatch", ROOT / "megabatch" / "config", ROOT / "converters")
    assert not [place for place in places if not any((root / place).exists() for root in roots)]
