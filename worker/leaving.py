"""What a worker that leaves does with the answers that it has begun. Pure: it knows what workers say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def must_end_here(weights_id: str, others: Iterable[Mapping[str, str]]) -> bool:
    """Whether others stay that serve the model, but none with these weights: a rolling change, after which nobody could
    go on.

    Where nobody else serves it, who starts next with these weights goes on. Workers that do not name their weights are
    of an older version, which may be alike.
    """
    theirs = {other.get("weights_id", weights_id) for other in others if not other.get("leaving")}
    return bool(theirs) and weights_id not in theirs
