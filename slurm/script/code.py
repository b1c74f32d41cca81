"""How a task gets the code of its job: the archive that was submitted, checked by its digest on each node."""

from __future__ import annotations

from megabatch.run_directory import ExitCode
from megabatch.slurm.job import JobSpec
from megabatch.slurm.profile import ClusterProfile
from megabatch.slurm.quoting import shell

USE = "use_code"
"""Function of `own_code` that puts the snapshot, if there is one, on PYTHONPATH; it fails with an exit code."""


def own_code(job: JobSpec, profile: ClusterProfile) -> list[str]:
    """Bash functions at the start of each task, held in a variable: they make private folders, one with the code.

    Others may be able to write the archive, even between this check and a rank's last import. So a node's first task
    copies it, checks the copy, and unpacks it where only this user can write; all other tasks and later jobs use that.
    Files that go missing later are restored in place, while tasks run.
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
    """On the host, ranks keep an existing PYTHONPATH; in a container, only one that the user asked for."""
    if job.snapshot is None:
        return [f"{USE}() {{ :; }}"]
    own = "PYTHONPATH" in {**profile.environment, **job.environment}
    rest = "" if profile.container is not None and not own else "${PYTHONPATH:+:$PYTHONPATH}"
    values = {"REST": rest, "CONFIG": str(int(ExitCode.CONFIG)), "UNUSED_DAYS": str(_UNUSED_DAYS)}
    text = _USE
    for name, value in values.items():
        text = text.replace(name, value)
    return text.splitlines()


_CACHE = """\
# code is loaded from here: the folder must belong to this user alone
private_cache() {
    cache=LOCAL_CACHE/megabatch-"$UID"
    mkdir -m 700 -- "$cache" 2>/dev/null || true
    if [ ! -d "$cache" ] || [ -L "$cache" ] || [ ! -O "$cache" ]; then
        cache=$(mktemp -d -p LOCAL_CACHE || mktemp -d)
    fi
}"""

_UNUSED_DAYS = 30
"""After which a node forgets code that no task began with; one that still runs keeps its own."""

_USE = """\
use_code() {
    local digest found code copy lock
    private_cache
    digest=${MEGABATCH_CODE##*/} digest=${digest%.tar} code=$cache/code/${digest:0:16}
    mkdir -p -- "$cache/code" && exec {lock}>"$cache/code/.lock" || return 1
    flock "$lock" || true
    if [ "${SLURM_LOCALID:-0}" = 0 ]; then forget_code; fi
    # cleaners of temporary folders may have taken some of it
    if ! is_whole "$code"; then
        copy=$(mktemp -d -p "$cache/code" .new.XXXXXXXX) || return 1
        cat -- "$MEGABATCH_CODE" >"$copy/tar" || { rm -rf -- "$copy"; return CONFIG; }
        read -r found _ < <(sha256sum <"$copy/tar")
        if [ "$found" != "$digest" ]; then
            echo "error: $MEGABATCH_CODE is not the code that was submitted (its SHA-256 is ${found:-unknown}):" \\
                "somebody changed it, or the disk did; submit the recipe again" >&2
            rm -rf -- "$copy"
            return CONFIG
        fi
        unpack_code || { rm -rf -- "$copy"; return 1; }
        rm -rf -- "$copy"
    fi
    # a task's for as long as it runs; systemd-tmpfiles leaves alone what is locked, too
    exec {code_in_use}<"$code" && flock -s "$code_in_use" || true
    exec {lock}>&-
    export PYTHONPATH="$codeREST"
}
is_whole() {
    local file files
    mapfile -d '' files 2>/dev/null <"$1/.files" || return 1
    for file in "${files[@]}"; do [ -f "$1/$file" ] || return 1; done
    [ "${#files[@]}" -gt 0 ]
}
# tasks of other jobs may be reading: no file of theirs goes away, and what is missing appears whole
unpack_code() {
    local file files
    mkdir "$copy/code" && tar -xf "$copy/tar" -C "$copy/code" --no-same-owner || return 1
    (cd "$copy/code" && find . -type f -print0) >"$copy/files" && mv -- "$copy/files" "$copy/code/.files" || return 1
    if [ ! -d "$code" ] || [ -L "$code" ]; then rm -f -- "$code"; fi
    if mv -T -- "$copy/code" "$code" 2>/dev/null; then return 0; fi
    mapfile -d '' files <"$copy/code/.files"
    for file in "${files[@]}" .files; do
        if ! cmp -s -- "$copy/code/$file" "$code/$file"; then
            mkdir -p -- "$(dirname -- "$code/$file")" && mv -fT -- "$copy/code/$file" "$code/$file" || return 1
        fi
    done
}
# what killed tasks left, and what nobody uses any more
forget_code() {
    local old
    touch -c -- "$code/.files" || true
    find "$cache/code" -mindepth 1 -maxdepth 1 -name '.new.*' -mmin +1440 -exec rm -rf -- {} + || true
    while IFS= read -rd '' old; do
        flock -nx "${old%/.files}" rm -rf -- "${old%/.files}" || true
    done < <(find "$cache/code" -mindepth 2 -maxdepth 2 -name .files -mtime +UNUSED_DAYS -print0)
}"""
