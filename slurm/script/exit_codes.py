"""What exit codes mean, as patterns of bash's `case`, and the marker of the first process that failed."""

from __future__ import annotations

from megabatch.run_directory import ExitCode

OF_SIGNAL = "129 | 1[3-8][0-9] | 19[0-2]"
"""`ExitCode.of_signal`."""
MAY_PASS = f"{ExitCode.CRASHED} | {ExitCode.HUNG} | {OF_SIGNAL}"
"""`ExitCode.may_pass`."""


WRITE_ONCE = """\
# words, file, who: whole or not at all, and nothing where another was first; not every disk has hard links
write_once() {
    { echo "$1" >"$2.$3" && { ln -- "$2.$3" "$2" || mv -n -- "$2.$3" "$2"; }; } 2>/dev/null || true
    rm -f -- "$2.$3"
}"""
"""For the markers of the first failure, which other tasks may read during the write."""
