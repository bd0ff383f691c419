"""The library: budgets, features, selections and the registry of methods. Uses torch, never vLLM."""
