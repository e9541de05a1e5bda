"""What a run needs of TPUs that are not here: memory, operations, traffic, a floor of time."""
