"""Ray itself: starting or joining it, its resources, placement groups and preemption."""
