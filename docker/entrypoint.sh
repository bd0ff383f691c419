#!/bin/sh
# Runs `promprune serve` with the container's arguments, and never without an API key by accident.
set -eu
for argument in "$@"; do
  case "$argument" in
    -h | --help | --dry-run) exec promprune serve "$@" ;; # these serve nothing, so they need no key
  esac
done
case "${VLLM_API_KEY:-}" in
  '')
    echo "promprune: VLLM_API_KEY is not set. Set it to a long random key, which clients then send as their" >&2
    echo "promprune: API key; or set VLLM_API_KEY=off to serve anyone who reaches the port." >&2
    exit 2
    ;;
  off)
    echo "promprune: VLLM_API_KEY=off: anyone who reaches the port is served" >&2
    unset VLLM_API_KEY
    ;;
esac
exec promprune serve "$@"
