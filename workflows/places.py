"""Which placement group belongs to which trial, so that a sweep can free the place of one that was killed.

Ray Train frees it itself, but not where its controller is killed with the trial while the workers start,
nor where Ray runs without its dashboard. Placement groups of a Train run bear no name; what they ask for
can be read, though. So each trial's workers ask for a few bytes of memory that no other trial's ask for.
"""

import zlib

from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

_MOST_BYTES = 2**20


def mark_of(trial_id: str) -> dict[str, float]:
    """What a trial's workers ask Ray for besides processors."""
    return {"memory": float(1 + zlib.crc32(trial_id.encode()) % _MOST_BYTES)}


def free_places(trial_ids: set[str]) -> None:
    """Remove the placement groups of trials that are over, and with them workers that still run there."""
    marks = {mark_of(trial_id)["memory"] for trial_id in trial_ids}
    for number, group in placement_group_table().items():
        asked = {bundle.get("memory") for bundle in group["bundles"].values()}
        if group["state"] != "REMOVED" and asked & marks:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(number)))
