"""Which patches a view keeps: one file a policy (policy.py says what it is, policies.py lists)."""
