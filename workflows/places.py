"""Where the workers of each trial stand, so that the sweep can free the place of a trial that was killed."""

from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group


class Places:
    """An actor of the sweep that trials tell of their workers' placement groups."""

    def __init__(self) -> None:
        self._groups: dict[str, str] = {}

    def note(self, trial_id: str, placement_group: str | None) -> None:
        """A trial's workers stand in this group; its id in hexadecimal."""
        if placement_group is not None:
            self._groups[trial_id] = placement_group

    def take(self, trial_id: str) -> str | None:
        """What was noted of a trial, once."""
        return self._groups.pop(trial_id, None)


def open_places() -> Any:
    """A `Places` actor of this process."""
    return ray.remote(num_cpus=0)(Places).remote()


def free_place(places: Any, trial_id: str) -> None:
    """Remove a trial's placement group, and with it workers that still run there.

    Ray Train does so itself unless its own actors are killed with the trial.
    """
    found = ray.get(places.take.remote(trial_id), timeout=30.0)
    if found is not None:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(found)))


def current_place() -> str | None:
    """The id of the placement group that this worker stands in, in hexadecimal."""
    group = ray.util.get_current_placement_group()
    return None if group is None else group.id.hex()
