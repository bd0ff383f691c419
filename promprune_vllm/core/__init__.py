"""The library: budgets, features, selections and the registry of methods. Knows torch, not vLLM."""
