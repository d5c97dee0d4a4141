"""Runs over several nodes: hostfile, remote processes, the doctor's checks, the supervisor."""
