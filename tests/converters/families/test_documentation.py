"""docs/families.md says of every family what is true of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from cases import CASES

from megabatch.converters.families import FAMILIES, family_of
from megabatch.trainable import BUILT, UNBUILT, untrainable

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def test_the_page_lists_every_family_and_whether_it_trains(saved: Callable[[str], Path]) -> None:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    table = {found[1]: row for row in cells if row and (found := re.fullmatch(r"`(\w+)`", row[0]))}
    assert set(table) == set(FAMILIES) == {*BUILT, *UNBUILT}
    for name in CASES:
        config = json.loads((saved(name) / "config.json").read_text())
        family = family_of(config)
        shape = family.shape(config | {"sliding_window": None} if family.name == "mistral" else config)
        if shape.num_labels is None:
            says = table[family.name][3].startswith("yes")
            assert says == (untrainable(shape) is None), family.name
