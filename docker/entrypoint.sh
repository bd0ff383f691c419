#!/bin/sh
# `promprune serve` with whatever follows the image's name, and never without an API key by accident.
set -eu
for argument in "$@"; do
  case "$argument" in
    -h | --help | --dry-run) exec promprune serve "$@" ;; # serve nothing, so need no key
  esac
done
case "${VLLM_API_KEY:-}" in
  '')
    echo "promprune: VLLM_API_KEY is not set. Give it a long random key, which clients then send as their" >&2
    echo "promprune: API key; or VLLM_API_KEY=off to serve whoever reaches the port." >&2
    exit 2
    ;;
  off)
    echo "promprune: VLLM_API_KEY=off: whoever reaches the port is served" >&2
    unset VLLM_API_KEY
    ;;
esac
exec promprune serve "$@"
