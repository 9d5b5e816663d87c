"""Attack the product: ten thousand hostile inputs, kills at every rename, four hundred damaged or malicious files.

    make attack                                              # all of it, minutes
    python tests/attack/attack.py --only options --case 17   # one case again
    python tests/attack/attack.py --share 0.01               # a hundredth, to see that it runs

Prints a table and ends with 0 only if nothing broke: no traceback in place of an error with words, nothing that hangs,
runs code, is silently wrong, lost or stuck.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from engine import BAD, ENDS, line_of, run, say  # noqa: E402
from inputs import entries, options, specs, tables  # noqa: E402
from kills import kills  # noqa: E402
from stored import checkpoints, predictors  # noqa: E402

SECTIONS = {
    "kills": (kills, 150),
    "options": (options, 3000),
    "predictors": (predictors, 1000),
    "checkpoints": (checkpoints, 420),
    "tables": (tables, 3000),
    "entries": (entries, 2000),
    "specs": (specs, 1000),
}


def main() -> int:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(SECTIONS), action="append")
    parser.add_argument("--case", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chosen = {
        name: (function, max(1, round(count * given.share)))
        for name, (function, count) in SECTIONS.items()
        if not given.only or name in given.only
    }
    header = f"{'section':<14}" + "".join(f"{end:>11}" for end in ENDS) + f"{'time':>11}"
    say(header)
    found = run(chosen, seed=given.seed, only=given.case)
    say(f"\n{header}")
    for name in chosen:
        say(line_of(name, found[name]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    bad = sum(found[name]["counts"][end] for name in found for end in BAD)
    tried = sum(sum(each["counts"].values()) for each in found.values())
    say(f"\n{tried} cases, {bad} of them bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
