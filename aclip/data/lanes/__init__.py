"""Which sample comes next: lanes, their order, sources by weight, and patience with bad samples."""
