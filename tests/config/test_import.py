"""What importing a recipe's names costs and drags in."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
before = set(sys.modules)
import megabatch
{more}
print(*sorted({{name.partition('.')[0] for name in set(sys.modules) - before}}))
"""


def _imported(more: str = "") -> set[str]:
    done = subprocess.run([sys.executable, "-c", CODE.format(more=more)], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_recipes_import_nothing_but_the_standard_library():
    assert {name for name in _imported() if name not in sys.stdlib_module_names} == {"megabatch"}


def test_checking_and_resolving_import_nothing_more():
    more = "import megabatch.config.flags, megabatch.config.run, megabatch.config.rules.check, megabatch.config.help"
    assert {name for name in _imported(more) if name not in sys.stdlib_module_names} == {"megabatch"}
