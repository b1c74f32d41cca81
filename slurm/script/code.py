"""How a task gets the code of its job: the archive that was submitted, checked by its digest on each node."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import shell

USE = "use_code"
"""Function of `own_code` that puts the code on PYTHONPATH, where there is a snapshot; it fails with an exit code."""


def own_code(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """Bash functions that tasks begin with, held in a variable: folders of this user, and the code in one of them.

    Others may write where the archive lies, also between this check and a rank's last import. So a node's first task
    copies it, checks the copy, and unpacks it where this user alone can write; all others, and later jobs, use that.
    """
    return [
        "own_code=$(cat <<'CODE'",
        *_CACHE.replace("LOCAL_CACHE", shell(profile.local_cache)).splitlines(),
        *_use(job, profile),
        "CODE",
        ")",
    ]


def archive(job: JobSpec) -> list[str]:
    """Names the code for the tasks."""
    if job.snapshot is None:
        return []
    text = "# the code as it was at submission, named by its SHA-256"
    return [text, f"export MEGABATCH_CODE={shell(str(job.snapshot))}"]


def _use(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """An image's or the host's own PYTHONPATH is for the host alone; one that was asked for is for a container too."""
    if job.snapshot is None:
        return [f"{USE}() {{ :; }}"]
    own = "PYTHONPATH" in {**profile.environment, **job.environment}
    rest = "" if profile.container is not None and not own else "${PYTHONPATH:+:$PYTHONPATH}"
    return _USE.replace("REST", rest).replace("CONFIG", str(int(ExitCode.CONFIG))).splitlines()


_CACHE = """\
# code is loaded from here: the folder must belong to this user alone
private_cache() {
    cache=LOCAL_CACHE/megabatch-"$UID"
    mkdir -m 700 -- "$cache" 2>/dev/null || true
    if [ ! -d "$cache" ] || [ -L "$cache" ] || [ ! -O "$cache" ]; then
        cache=$(mktemp -d -p LOCAL_CACHE || mktemp -d)
    fi
}"""

_USE = """\
use_code() {
    local digest found code copy lock locked
    private_cache
    digest=${MEGABATCH_CODE##*/} digest=${digest%.tar} code=$cache/code/${digest:0:16}
    mkdir -p -- "$cache/code" && exec {lock}>"$cache/code/.lock" || return 1
    locked=
    if flock "$lock"; then locked=1; fi
    # cleaners of temporary folders may have taken some of it
    if ! read -r found 2>/dev/null <"$code/.files" || [ "$found" != "$(files_of "$code")" ]; then
        # of tasks that were killed, where no other one can be at it
        if [ -n "$locked" ]; then rm -rf -- "$cache"/code/.new.*; fi
        copy=$(mktemp -d -p "$cache/code" .new.XXXXXXXX) || return 1
        cat -- "$MEGABATCH_CODE" >"$copy/tar" || return CONFIG
        read -r found _ < <(sha256sum <"$copy/tar")
        if [ "$found" != "$digest" ]; then
            echo "error: $MEGABATCH_CODE is not the code that was submitted (its SHA-256 is ${found:-unknown}):" \\
                "somebody changed it, or the disk did; submit the recipe again" >&2
            rm -rf -- "$copy"
            return CONFIG
        fi
        mkdir "$copy/code" && tar -xf "$copy/tar" -C "$copy/code" --no-same-owner || return 1
        files_of "$copy/code" >"$copy/code/.files"
        if [ -e "$code" ]; then mv -T -- "$code" "$copy/old"; fi
        mv -T -- "$copy/code" "$code" || return 1
        rm -rf -- "$copy"
    fi
    exec {lock}>&-
    export PYTHONPATH="$codeREST"
}
files_of() { find "$1" -name __pycache__ -prune -o -type f ! -name .files -print | wc -l; }"""
