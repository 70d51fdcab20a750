"""Ray itself: starting or joining it, placement groups and preemption."""
