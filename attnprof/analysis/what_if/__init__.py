"""What another program would have needed: a run's allocations, rewritten and replayed."""
