"""What the processes of these tests run instead of `baton`: the same command, sabotaged as the environment says.

`BATON_TEST_SABOTAGE` removes a part of the protocol (sabotage.py), `BATON_TEST_CRASH` has the process kill itself at a
step of it (crash_points.py), `BATON_TEST_POISON` when it begins a job with that seed; it hangs at the engine's step
`BATON_TEST_HANG`, and its logits are NaN from step `BATON_TEST_NAN` on. Production code has no such switch: everything
is patched here, before the command begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from deploy import cli
from tests.chaos import crash_points, sabotage


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    for name in filter(None, environment.get("BATON_TEST_SABOTAGE", "").split(",")):
        sabotage.SABOTAGES[name]()
    if crash := environment.get("BATON_TEST_CRASH"):
        point, _, passage = crash.rpartition(":")
        crash_points.arm(point, int(passage))
    if seed := environment.get("BATON_TEST_POISON"):
        crash_points.die_of(int(seed))
    if step := environment.get("BATON_TEST_HANG"):
        crash_points.hang_at(int(step))
    if step := environment.get("BATON_TEST_NAN"):
        crash_points.go_bad_at(int(step))
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
