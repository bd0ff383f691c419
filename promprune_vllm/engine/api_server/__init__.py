"""Code that runs in the API server.

A request passes these modules in this order: ``http_fields`` and ``request_fields`` (raw fields of the body),
``pruning_request`` (parsed), ``admission`` (can this model do it), ``request_hooks`` (attached to the prompt),
``processor`` (applies the policy), ``pruning_plan`` (tokens per image), ``prompt_metrics`` (counted).
"""
