"""Real faults for tests: killed processes, damaged files, full disks."""
