"""The sbatch script of a job: a pure function of what is asked for, the same on a laptop as on a cluster.

How a run stops: before the time limit Slurm sends USR2 to the batch shell, which forwards it to every rank through
srun. All ranks save after the same step and exit with `ExitCode.REQUEUE`; the shell then requeues the job. After
TERM (scancel, preemption, an operator's requeue) the ranks save too, but Slurm decides whether the job comes back.
The shell also requeues after failures that may pass, as long as the attempts before them made progress.
"""

from __future__ import annotations

from megabatch.slurm.environment import job_variables
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.script.code import archive, own_code
from megabatch.slurm.script.directives import directives
from megabatch.slurm.script.ending import finish
from megabatch.slurm.script.inputs import inputs
from megabatch.slurm.script.links import earlier_links
from megabatch.slurm.script.preflight import preflight
from megabatch.slurm.script.ranks import launch, rank_script
from megabatch.slurm.script.rendezvous import RENDEZVOUS
from megabatch.slurm.script.roles import end_roles, start_roles
from megabatch.slurm.script.stopping import STOP_HANDLING, run_directory
from megabatch.slurm.script.variables import check_names, check_words, environment, modules
from megabatch.slurm.script.watchdog import watchdog


def render(job: JobSpec, profile: ClusterProfile) -> str:
    """The exact text that sbatch gets.

    Raises: LaunchError for a secret in a variable or command, for a variable that the script itself sets, and for
    text that Slurm or bash cannot carry.
    """
    variables = job_variables(job, profile)
    inherit = tuple(dict.fromkeys((*profile.inherit, *job.inherit)))
    check_names(variables, inherit)
    check_words(job)
    sections = (
        directives(job, profile),
        ["set -eo pipefail"],
        STOP_HANDLING,
        earlier_links(job),
        run_directory(job),
        inputs(job),
        modules(profile),
        environment(job, variables, inherit),
        archive(job),
        RENDEZVOUS,
        own_code(job, profile),
        preflight(job, profile),
        rank_script(variables),
        watchdog(job),
        start_roles(job, profile),
        launch(job, profile),
        end_roles(job),
        finish(job),
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"
