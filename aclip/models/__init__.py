"""The student: towers, projections, heads."""
