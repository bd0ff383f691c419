"""Our part of the HTTP API: routes, schemas, reply headers, the inspector page. Imports neither vLLM nor torch."""
