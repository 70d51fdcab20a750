"""Which placement group belongs to which trial, so that a sweep can free the place of one that was killed.

Ray Train frees it itself, but not where its controller is killed with the trial while the workers start,
nor where Ray runs without its dashboard. Placement groups of a Train run bear no name; what they ask for
can be read, though. So each trial's workers ask for a few bytes of memory that no other trial's ask for.
"""

import os
import signal
import zlib
from contextlib import suppress

import ray
from ray._private import state
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

_MOST_BYTES = 2**20
_CLEANER, _CONTROLLER = "PlacementGroupCleaner", "TrainController"  # Ray Train's names


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


def end_cleaners() -> None:
    """End Ray Train's own cleaners of trainings that are gone, where they run on this machine.

    They ask Ray's dashboard whether their training still runs, and without one they would stay.
    """
    context = ray.get_runtime_context()
    ours = [actor for actor in state.actors().values() if actor["JobID"] == context.get_job_id()]
    alive = [actor for actor in ours if actor["State"] == "ALIVE"]
    controllers = [actor["Address"] for actor in alive if actor["ActorClassName"] == _CONTROLLER]
    for actor in alive:
        orphan = actor["ActorClassName"] == _CLEANER and actor["OwnerAddress"] not in controllers
        if orphan and actor["Address"]["NodeID"] == context.get_node_id():
            with suppress(ProcessLookupError):
                os.kill(actor["Pid"], signal.SIGTERM)
