"""The benchmark harness: sweeps, memory frontiers and reports over shapes and pruned models."""
