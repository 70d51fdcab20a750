"""Association of placement groups with trials, so that a sweep can free the resources of a killed trial.

Ray Train removes a run's placement group itself, except when its controller is killed with the trial while
the workers start. The placement groups of Ray Train have no name,
but the resources that they request can be read. So the workers of each trial request a few bytes of memory,
a number that identifies the trial.
"""

import zlib

from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

_MAX_BYTES = 2**20


def memory_tag(trial_id: str) -> dict[str, float]:
    """Memory in bytes that each worker of a trial requests from Ray, as a tag of the trial."""
    return {"memory": float(1 + zlib.crc32(trial_id.encode()) % _MAX_BYTES)}


def remove_placement_groups(trial_ids: set[str]) -> None:
    """Remove the placement groups of trials that have ended, and with them any workers still in them."""
    tags = {memory_tag(trial_id)["memory"] for trial_id in trial_ids}
    for group_id, group in placement_group_table().items():
        requested = {bundle.get("memory") for bundle in group["bundles"].values()}
        if group["state"] != "REMOVED" and requested & tags:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))
